"""WeightAverage: the exponential average of a model's weights, kept beside the model.

Zhang et al. (arXiv 2410.21676; `olmo/optim.py` of their code) begin with zeros, and divide by what
is then missing when they evaluate:

    w <- tau w + (1 - tau) theta,    average = w / (1 - product of all tau)

Here the quotient itself is kept. With `retained`, the product of all tau, it follows

    average <- average + (1 - tau) / (1 - retained) (theta - average)

which is the same number, needs no correction afterwards, and takes the first weights exactly. An
average that begins with the weights instead of zeros is the one with `retained` = 0.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from .averaging_files import read_average, read_shapes, read_state, write_average


# Parts of a parameter's name that torch's wrappers add.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


class WeightAverage:
    """The average of the trainable parameters; buffers stay as training has them.

    Averages are held in float32 (float64 for parameters in float64), of this process's shard where
    a parameter is sharded. In float32, what moves an average by less than 6e-8 of itself is lost:
    it may lag behind by 6e-8 / (1 - decay) of a weight, which is 6e-4 at a decay of 0.9999.

    A parameter that was frozen is averaged from the step on in which it is trainable: its average
    until then is the weight itself. One that is frozen later keeps being averaged.

    Args:
        model: As it is trained; FSDP2's and tensor-parallel shards in place.
        initialisation: "zero", corrected for its beginning as the paper's, or "weights": the
            present ones, which then fade out.

    Raises:
        ValueError: If the parameters are FSDP1's flat ones, or the initialisation is another.

    Attributes:
        updates: How many weights are in the average.
        retained: How much of the zeros it began with is still in it: the product of all decays.
        tokens_seen: Where training stood at the last update.
    """

    def __init__(
        self, model: nn.Module, initialisation: Literal["zero", "weights"] = "zero"
    ) -> None:
        check_initialisation(initialisation)
        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            raise ValueError(
                f"model ({type(model).__name__}) must not be sharded by FSDP1, because the average "
                "of a piece of a flat parameter could not be saved for other layouts; use FSDP2 "
                "(fsdp_version: 2)."
            )
        self.updates, self.tokens_seen = 0, 0
        self.retained = 1.0 if initialisation == "zero" else 0.0
        self._units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self._in_place = False
        self._reshard()  # else a forward without a backward may have left other parameters there
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        self._frozen = {_plain_name(name): p for name, p in inner.named_parameters()}
        self._parameters: dict[str, nn.Parameter] = {}
        self._averages: dict[str, Tensor] = {}
        self.enter_trainable()

    @property
    def is_defined(self) -> bool:
        """Whether anything is in the average; one that begins with zeros has none at first."""
        return self.retained < 1

    @property
    def is_in_place(self) -> bool:
        """Whether it is in the parameters' place now."""
        return self._in_place

    def is_of(self, model: nn.Module) -> bool:
        """Whether the parameters that it is of are a model's.

        Args:
            model: Wrapped or not.

        Returns:
            False for another model, also one of the same architecture.
        """
        self._reshard()  # a forward may have left gathered ones in their place
        theirs = {id(parameter) for parameter in model.parameters()}
        return all(id(parameter) in theirs for parameter in self._parameters.values())

    @property
    def values(self) -> Mapping[str, Tensor]:
        """The averages by the parameters' names; of sharded parameters, sharded alike."""
        return self._averages

    def enter_trainable(self) -> None:
        """Take in the parameters that have become trainable, before a step changes them."""
        found = [name for name, p in self._frozen.items() if p.requires_grad]
        for name in found:
            self._enter(name)

    def _enter(self, name: str) -> None:
        """With the average that a parameter has which was constant until now: itself."""
        parameter = self._frozen.pop(name)
        kind = torch.promote_types(parameter.dtype, torch.float32)
        self._parameters[name] = parameter
        self._averages[name] = parameter.detach().to(kind, copy=True)

    @torch.no_grad()
    def update(self, decay: float, *, tokens_seen: int = 0) -> None:
        """Take in the present weights, after an optimizer step.

        Args:
            decay: tau, the share of the old average that is kept, in [0, 1].
            tokens_seen: Where training stands, to be kept beside the average.

        Raises:
            RuntimeError: While the average is in the parameters' place.
        """
        if self._in_place:
            raise RuntimeError(
                "The weights must be training's own while they are averaged, but their average is "
                "in their place; leave averaged_weights() before training goes on."
            )
        self.updates, self.tokens_seen = self.updates + 1, tokens_seen
        if decay == 1:  # a step without tokens weighs nothing
            return
        self.retained *= decay
        rate = (1 - decay) / (1 - self.retained)
        alike: tuple[list[Tensor], list[Tensor]] = [], []
        for name, parameter in self._parameters.items():
            average, weight = _local(self._averages[name]), _local(parameter)
            if average.dtype == weight.dtype:
                alike[0].append(average)
                alike[1].append(weight)
            else:  # one after the other: a copy of one tensor at a time
                average.lerp_(weight.to(average.dtype), rate)
        # Not average * decay + weight * rate: in float32 these do not add up to one.
        if alike[0]:
            torch._foreach_lerp_(*alike, rate)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the average into the parameters, and training's weights back whatever happens.

        Everything that refers to the parameters stays valid. It takes one more copy of them,
        usually where gradients were. Nested in itself it does nothing more; before the first update
        an average from zero is undefined, and the weights stay as they are.

        Yields:
            Nothing.
        """
        if self._in_place or not self.is_defined:
            yield
            return
        self._reshard()
        kept = {name: _local(p).detach().clone() for name, p in self._parameters.items()}
        self._in_place = True
        try:
            self._fill(self._averages)
            yield
        except BaseException:
            self._drop_gathered()
            raise
        finally:
            try:
                self._put_back(kept)
            except BaseException:  # interrupted once more, right here
                self._put_back(kept)
                raise

    def _put_back(self, kept: Mapping[str, Tensor]) -> None:
        self._reshard()  # what a forward has gathered is the average
        self._fill(kept)
        self._in_place = False

    @torch.no_grad()
    def _fill(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            _local(parameter).copy_(_local(values[name]))

    def _reshard(self) -> None:
        for unit in self._units:
            unit.reshard()

    def _drop_gathered(self) -> None:
        """What FSDP2 has gathered for a forward that was cut off; it would go on with it."""
        # torch 2.13 has it. Before the first forward it stumbles, and there is nothing to drop.
        # What is to be seen is the error that led here.
        with contextlib.suppress(Exception):
            if self._units:
                self._units[0].reset_iter_state()

    def save(self, folder: str | os.PathLike[str], *, writes: bool = True) -> None:
        """Save the average, to be loaded in any layout; to be called on all processes.

        Args:
            folder: Of its own. What was saved there before is replaced.
            writes: Whether this process saves what all of them hold.
        """
        state = {
            "updates": self.updates,
            "retained": self.retained,
            "tokens_seen": self.tokens_seen,
        }
        write_average(folder, self._averages, state, writes=writes)

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Go on with an average that was saved, in this layout or another.

        Args:
            folder: The one that was given to `save`, with all of it in sight of every process.

        Raises:
            ValueError: If it is not whole, another version's, or another model's.
        """
        state = read_state(folder)
        known: dict[str, Tensor] = {**self._frozen, **self._parameters}
        shapes = read_shapes(folder)
        for name, shape in shapes.items():
            if name not in known or known[name].shape != shape:
                raise ValueError(
                    f"{name!r} of {os.fspath(folder)} must be a parameter of the model, of the "
                    "same shape, because its average goes on; resume with the model that was saved."
                )
            if name in self._frozen:  # was trainable, and may be again
                self._enter(name)
        read_average(folder, {name: self._averages[name] for name in shapes})
        self.updates, self.retained = int(state["updates"]), float(state["retained"])
        self.tokens_seen = int(state["tokens_seen"])


def check_initialisation(initialisation: str) -> None:
    """Refuse another beginning than the two there are.

    Args:
        initialisation: Of a `WeightAverage`.

    Raises:
        ValueError: If it is another.
    """
    if initialisation not in ("zero", "weights"):
        raise ValueError(
            f"initialisation ({initialisation!r}) must be 'zero' or 'weights', because an average "
            "begins with either; use 'zero', which forgets the first weights."
        )


def _local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor; shares its storage."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _plain_name(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
