"""GradientProbe: the squared norms of every small batch's gradient, seen at the autograd leaves.

A tensor hook on a leaf fires once in each backward with this rank's gradient of this micro-batch:
before it is accumulated, reduced over ranks or clipped, and with all uses of a tied weight summed.
The unit is therefore always (data-parallel rank, micro-batch), whatever the parallelism; only the
list of leaves depends on it (`leaves`). No gradient is copied; a leaf costs one reduction over its
gradient.
"""

from collections.abc import Sequence
from functools import partial
from types import TracebackType

import torch
from torch import nn

from .leaves import GradientLeaves, Leaf, on_this_process
from .moments import GradientMoments, MomentSums


# Rows up to this length are summed in fp32 to 1e-7; one flat fp32 norm of 1e7 elements is 7e-4 off
# on CPU, which matters because the noise is a difference of two norms.
_LONGEST_FP32_ROW = 16384


def gradient_norm(gradient: torch.Tensor) -> torch.Tensor:
    """The 2-norm of one gradient, accurate to about 1e-7 also on CPU.

    Args:
        gradient: Any shape and floating or complex dtype.

    Returns:
        A scalar on the gradient's device, float32 or float64; no synchronisation.
    """
    if gradient.is_complex():
        gradient = torch.view_as_real(gradient)
    wide = gradient.dtype is torch.float64
    if wide or gradient.device.type != "cpu" or gradient.dim() == 0:
        return torch.linalg.vector_norm(gradient, dtype=None if wide else torch.float32)
    if gradient.shape[-1] > _LONGEST_FP32_ROW:
        return torch.linalg.vector_norm(gradient, dtype=torch.float64)
    rows = torch.linalg.vector_norm(gradient, dim=-1, dtype=torch.float32)
    return torch.linalg.vector_norm(rows, dtype=torch.float64)


class GradientProbe:
    """Measures one optimizer step: attach, run the micro-batches, finish.

        with GradientProbe(model) as probe:            # hooks on
            for batch in micro_batches:
                (weight * loss(batch)).backward()
                probe.end_micro_batch()
            moments = probe.finish(samples, weights)   # before clipping
                                                       # hooks off

    Args:
        model: The model whose leaves are watched, wrapped as it is trained.
        processes: How many run this step together.
        copies: How many of them share a data-parallel rank's samples, as tensor-parallel ones do.
        total_from_backward: Take the norm of the step's gradient as backward leaves it, instead of
            from `.grad` in `finish`; for callers that see gradients only after clipping. One more
            reduction per leaf and micro-batch.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        processes: int = 1,
        copies: int = 1,
        total_from_backward: bool = False,
    ) -> None:
        self._known_leaves = GradientLeaves(model)
        self._processes, self._copies = processes, copies
        self._total_from_backward = total_from_backward
        self._leaves: list[Leaf] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        # Of the micro-batch in hand: norms of the gradients seen, how often each was, what has
        # arrived of one that comes in parts, and one that was seen too often.
        self._norms: list[_Part] = []
        self._seen: dict[str, int] = {}
        self._halves: dict[str, torch.Tensor] = {}
        self._twice: str | None = None
        # Of the step in hand: norms of each micro-batch ended, and of the accumulated gradients.
        self._micro_batches: list[_Parts] = []
        self._totals: dict[str, _Part] = {}

    def __enter__(self) -> "GradientProbe":
        """Attach."""
        self.attach()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Detach, whatever happened."""
        self.detach()

    @property
    def attached(self) -> bool:
        """Whether hooks are on the model."""
        return bool(self._handles)

    def attach(self) -> None:
        """Put hooks on the leaves and start a step. What is trainable is looked up anew.

        To be called on all ranks; the first time, FSDP2 gathers its parameters for it, one by one.

        Hooks run in the order of their registration, so that attaching late sees a gradient as the
        user's own hooks have changed it.
        """
        self.detach()
        self._leaves = self._known_leaves.trainable()
        for leaf in self._leaves:
            see, see_total = partial(self._see, leaf), partial(self._see_total, leaf.name)
            for tensor in leaf.tensors:
                self._handles.append(tensor.register_hook(see))
                if self._total_from_backward:
                    self._handles.append(tensor.register_post_accumulate_grad_hook(see_total))

    def detach(self) -> None:
        """Take all hooks off and forget an unfinished step; may be called at any time."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._norms, self._seen, self._halves, self._twice = [], {}, {}, None
        self._micro_batches, self._totals = [], {}

    def end_micro_batch(self) -> None:
        """Close one micro-batch after its backward.

        Raises:
            RuntimeError: If a leaf's gradient arrived in two parts, so that no norm of it was seen.
        """
        if self._twice is not None:
            raise RuntimeError(
                f"The gradient of {self._twice!r} arrived in two parts within one micro-batch, "
                "so its norm was never seen: this happens with reentrant activation "
                "checkpointing of a shared weight, or with two backward passes. Use "
                'gradient_checkpointing_kwargs={"use_reentrant": False}, or one backward.'
            )
        parts = self._norms + [_part(gradient) for gradient in self._halves.values()]
        self._norms, self._seen, self._halves = [], {}, {}
        self._micro_batches.append(_stacked(parts))

    def finish(
        self, global_batch_size: int, weights: Sequence[float], *, loss_scale: float = 1.0
    ) -> GradientMoments | None:
        """End the step of a single process: `sums`, made into moments.

        Args:
            global_batch_size: B, the samples of this step.
            weights: As in `sums`.
            loss_scale: As in `sums`.

        Returns:
            The moments, possibly not finite; None if fewer than two micro-batches have a weight, of
            which no noise can be measured.
        """
        sums = self.sums(weights, loss_scale=loss_scale)
        return GradientMoments.of_sums(sums, global_batch_size=global_batch_size)

    def sums(self, weights: Sequence[float], *, loss_scale: float = 1.0) -> MomentSums:
        """End the step after its last backward, before gradients are clipped or unscaled.

        Args:
            weights: How each micro-batch's mean gradient is weighted in the step's gradient, up to
                a factor common to all ranks: its target tokens, or its samples, or the same for
                all. One of weight 0 is left out.
            loss_scale: What the loss was multiplied by (an fp16 gradient scaler); divided out.

        Returns:
            This process's share of the sums, on the host, possibly not finite.

        Raises:
            RuntimeError: If no gradient was seen at all.
            ValueError: If there are not as many weights as micro-batches, or one is not >= 0.
        """
        seen, self._micro_batches = self._micro_batches, []
        if len(seen) != len(weights):
            raise ValueError(
                f"weights ({len(weights)}) must be one for each micro-batch ({len(seen)} were "
                "ended); call end_micro_batch after every backward."
            )
        if not all(weight >= 0 for weight in weights):
            raise ValueError(
                f"weights ({list(weights)}) must not be negative or NaN, because they are shares "
                "of the step; pass 0 for a micro-batch without targets."
            )
        if all(norms is None for norms, _ in seen):
            raise RuntimeError(
                "No gradient reached the trainable parameters in this step, so nothing can be "
                "measured: the loss must depend on them, and backward must run between attach and "
                "finish."
            )
        totals, self._totals = list(self._totals.values()), {}
        if not self._total_from_backward:
            totals = [
                _part(parameter.grad, leaf.shards)
                for leaf in self._leaves
                for parameter in leaf.parameters
                if parameter.grad is not None
            ]
        counted = [(parts, weight) for parts, weight in zip(seen, weights, strict=True) if weight]
        # The only synchronisation with the device.
        big, *squares = _sums_of_squares([_stacked(totals), *(parts for parts, _ in counted)])
        small = sum(square / w for square, (_, w) in zip(squares, counted, strict=True))
        return MomentSums(
            weighted_sq_norms=small / self._copies / loss_scale**2,
            weight=sum(weight for _, weight in counted) / self._copies,
            workers=len(counted) / self._copies,
            big_sq_norm=big / self._processes / loss_scale**2,
        )

    def _see(self, leaf: Leaf, gradient: torch.Tensor | None) -> None:
        if gradient is None:  # an autograd function may leave a weight without one: a zero
            return
        gradient, name = gradient.detach(), leaf.name
        seen = self._seen[name] = self._seen.get(name, 0) + 1
        if seen > len(leaf.tensors):
            self._twice = name
        if name in self._halves:
            gradient = self._halves.pop(name) + gradient
        if seen < len(leaf.tensors):
            self._halves[name] = gradient  # autograd does not write into what is held here
        else:
            self._norms.append(_part(gradient))

    def _see_total(self, name: str, leaf: torch.Tensor) -> None:
        if leaf.grad is not None:
            self._totals[name] = _part(leaf.grad)


# The norm of this process's part of a gradient, and over how many processes its parts are spread.
_Part = tuple[torch.Tensor, int]
# Of many gradients, in one vector; None for no gradient.
_Parts = tuple[torch.Tensor | None, list[int]]


def _part(gradient: torch.Tensor, shards: int | None = None) -> _Part:
    local, spread = on_this_process(gradient)
    return gradient_norm(local), spread if shards is None else shards


def _stacked(parts: list[_Part]) -> _Parts:
    """On the first one's device."""
    if not parts:
        return None, []
    device = parts[0][0].device
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    return torch.stack([norm.to(device, dtype) for norm, _ in parts]), [n for _, n in parts]


def _sums_of_squares(rows: list[_Parts]) -> list[float]:
    """In float64 on the host: fp32 squares would overflow, and some devices lack float64."""
    norms = [values for values, _ in rows if values is not None]
    if len({values.device for values in norms}) > 1:  # parameters offloaded to the host
        norms = [values.cpu() for values in norms]
    shards = torch.tensor([n for _, row in rows for n in row], dtype=torch.float64)
    squares = torch.cat(norms).cpu().double().square() * shards
    return [float(part.sum()) for part in squares.split([len(row) for _, row in rows])]
