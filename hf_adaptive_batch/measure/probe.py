"""GradientProbe: the squared norms of every small batch's gradient, seen at the autograd leaves.

A tensor hook on a leaf fires once in each backward with this rank's gradient of this micro-batch:
before it is accumulated, reduced over ranks or clipped, and with all uses of a tied weight summed.
The unit is therefore always (data-parallel rank, micro-batch), whatever the parallelism; only the
list of leaves depends on it. No gradient is copied; a leaf costs one reduction over its gradient.
"""

from collections.abc import Sequence
from functools import partial
from types import TracebackType

import torch
from torch import nn

from .moments import GradientMoments, MomentSums


# Rows up to this length are summed in fp32 to 1e-7; one flat fp32 norm of 1e7 elements is 7e-4 off
# on CPU, which matters because the noise is a difference of two norms.
_LONGEST_FP32_ROW = 16384


def autograd_leaves(model: nn.Module) -> dict[str, torch.Tensor]:
    """The trainable tensors into which autograd accumulates, by name; tied weights once.

    Args:
        model: A model in a single process; its parameters are the leaves.

    Returns:
        Name -> leaf, in the model's order.

    Raises:
        ValueError: If nothing is trainable, or an embedding makes sparse gradients.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            if module.weight.requires_grad:
                raise ValueError(
                    f"sparse (True) of the embedding {name!r} must be False, because the norm of "
                    "a sparse gradient with repeated rows is not the norm of its values; build "
                    "it with sparse=False, or freeze it."
                )
    leaves: dict[str, torch.Tensor] = {
        name: leaf for name, leaf in model.named_parameters() if leaf.requires_grad
    }
    if not leaves:
        raise ValueError(
            "model must have a trainable parameter, because the batch size is read from gradients; "
            "unfreeze some, or use Trainer."
        )
    return leaves


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
        model: The model whose leaves are watched.
        total_from_backward: Take the norm of the step's gradient as backward leaves it, instead of
            from `.grad` in `finish`; for callers that see gradients only after clipping. One more
            reduction per leaf and micro-batch.
    """

    def __init__(self, model: nn.Module, *, total_from_backward: bool = False) -> None:
        self._model = model
        self._total_from_backward = total_from_backward
        self._leaves: dict[str, torch.Tensor] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        # Of the micro-batch in hand: norms of the gradients seen, whose, and one seen twice.
        self._norms: list[torch.Tensor] = []
        self._seen: set[str] = set()
        self._twice: str | None = None
        # Of the step in hand: norms of each micro-batch ended, and of the accumulated gradients.
        self._micro_batches: list[torch.Tensor | None] = []
        self._totals: dict[str, torch.Tensor] = {}

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

        Hooks run in the order of their registration, so that attaching late sees a gradient as the
        user's own hooks have changed it.
        """
        self.detach()
        self._leaves = autograd_leaves(self._model)
        for name, leaf in self._leaves.items():
            self._handles.append(leaf.register_hook(partial(self._see, name)))
            if self._total_from_backward:
                self._handles.append(
                    leaf.register_post_accumulate_grad_hook(partial(self._see_total, name))
                )

    def detach(self) -> None:
        """Take all hooks off and forget an unfinished step; may be called at any time."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._norms, self._seen, self._twice = [], set(), None
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
        norms, self._norms, self._seen = self._norms, [], set()
        self._micro_batches.append(_stacked(norms) if norms else None)

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
        return GradientMoments.of_ranks([sums], global_batch_size=global_batch_size)

    def sums(self, weights: Sequence[float], *, loss_scale: float = 1.0) -> MomentSums:
        """End the step after its last backward, before gradients are clipped or unscaled.

        Args:
            weights: How each micro-batch's mean gradient is weighted in the step's gradient, up to
                a factor common to all ranks: its target tokens, or its samples, or the same for
                all. One of weight 0 is left out.
            loss_scale: What the loss was multiplied by (an fp16 gradient scaler); divided out.

        Returns:
            This rank's sums, on the host, possibly not finite: what the ranks exchange.

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
        if all(norms is None for norms in seen):
            raise RuntimeError(
                "No gradient reached the trainable parameters in this step, so nothing can be "
                "measured: the loss must depend on them, and backward must run between attach and "
                "finish."
            )
        if self._total_from_backward:
            totals = list(self._totals.values())
            self._totals = {}
        else:
            totals = [
                gradient_norm(leaf.grad) for leaf in self._leaves.values() if leaf.grad is not None
            ]
        counted = [(n, w) for n, w in zip(seen, weights, strict=True) if w > 0]
        # The only synchronisation with the device.
        rows = [_stacked(totals), *(norms for norms, _ in counted if norms is not None)]
        big, *squares = _sums_of_squares(rows)
        measured = [weight for norms, weight in counted if norms is not None]
        return MomentSums(
            weighted_sq_norms=sum(s / w for s, w in zip(squares, measured, strict=True))
            / loss_scale**2,
            weight=sum(weight for _, weight in counted),
            workers=len(counted),
            big_sq_norm=big / loss_scale**2,
        )

    def _see(self, name: str, gradient: torch.Tensor | None) -> None:
        if gradient is None:  # an autograd function may leave a weight without one: a zero
            return
        if name in self._seen:
            self._twice = name
        self._seen.add(name)
        self._norms.append(gradient_norm(gradient.detach()))

    def _see_total(self, name: str, leaf: torch.Tensor) -> None:
        if leaf.grad is not None:
            self._totals[name] = gradient_norm(leaf.grad)


def _stacked(norms: list[torch.Tensor]) -> torch.Tensor:
    """One vector on the first leaf's device."""
    device = norms[0].device
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    return torch.stack([norm.to(device, dtype) for norm in norms])


def _sums_of_squares(rows: list[torch.Tensor]) -> list[float]:
    """In float64 on the host: fp32 squares would overflow, and some devices lack float64."""
    squares = torch.cat(rows).cpu().double().square()
    return [float(part.sum()) for part in squares.split([len(row) for row in rows])]
