"""How others measure gradient noise: the arms that `overhead.py` runs beside the probe's.

Each looks like a `GradientProbe` to the step that it measures.
"""

from types import TracebackType

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_adaptive_batch.measure.moments import MomentSums
from hf_adaptive_batch.measure.probe import gradient_norm


try:
    from fairscale.optim import AdaScale
except ImportError:
    AdaScale = None


class Meter:
    """What does nothing yet at each of the moments of a step at which something can be measured."""

    def __enter__(self) -> "Meter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pass

    def end_micro_batch(self) -> None:
        pass

    def sums(self, weights: list[float]) -> MomentSums | tuple[()]:
        return ()


class CloneAndSubtract(Meter):
    """Without hooks: the gradient of a micro-batch is `.grad` after it less `.grad` before it.

    Holds one copy of all gradients, which also takes the difference. For a single process.
    """

    def __init__(self, parameters: list[nn.Parameter], micro_batches: int) -> None:
        self._parameters, self._micro_batches = parameters, micro_batches

    def __enter__(self) -> "CloneAndSubtract":
        self._left, self._before, self._seen = self._micro_batches, [], []
        return self

    def end_micro_batch(self) -> None:
        gradients = [p.grad for p in self._parameters]
        if self._before:
            torch._foreach_sub_(self._before, gradients)
        self._seen.append(self._norms(self._before or gradients))
        self._left -= 1
        if self._before and self._left:
            torch._foreach_copy_(self._before, gradients)
        elif self._left:
            self._before = [gradient.clone() for gradient in gradients]

    def sums(self, weights: list[float]) -> MomentSums:
        total = self._norms([p.grad for p in self._parameters])
        self._before = []
        return MomentSums(
            weighted_sq_norms=sum(float(norms.cpu().square().sum()) for norms in self._seen),
            weight=len(self._seen),
            workers=len(self._seen),
            big_sq_norm=float(total.cpu().square().sum()),
        )

    @staticmethod
    def _norms(gradients: list[torch.Tensor]) -> torch.Tensor:
        """By the probe's own function: the arms differ only in how they come by a gradient."""
        return torch.stack([gradient_norm(gradient).double() for gradient in gradients])


class BucketNorms(Meter):
    """A DDP communication hook: the norm of every bucket before its all-reduce and after it.

    The way of k-diffusion's `gns.py`. Under `no_sync` a bucket holds what the rank has accumulated:
    the small batches are the ranks'. A model has but one such hook, and cannot be rid of it.
    """

    def __init__(self, model: DistributedDataParallel) -> None:
        self._ranks = dist.get_world_size()
        self._before: list[torch.Tensor] = []
        self._after: list[torch.Tensor] = []
        model.register_comm_hook(self, BucketNorms._reduce)

    def _reduce(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        gradient = bucket.buffer()
        self._before.append(torch.linalg.vector_norm(gradient))
        work = dist.all_reduce(gradient.div_(self._ranks), async_op=True)

        def reduced(future: torch.futures.Future[list[torch.Tensor]]) -> torch.Tensor:
            [mean] = future.value()
            self._after.append(torch.linalg.vector_norm(mean))
            return mean

        return work.get_future().then(reduced)

    def sums(self, weights: list[float]) -> MomentSums:
        norms = torch.stack([*self._before, *self._after]).double().square().tolist()
        count, self._before, self._after = len(self._before), [], []
        return MomentSums(sum(norms[:count]), 1.0, 1.0, sum(norms[count:]) / self._ranks)


class FairscaleAdaScale(Meter):
    """fairscale's wrapper of an optimizer, which also hooks the parameters, for the one step.

    It estimates as it goes, with an all-reduce of its own. Its `step` would multiply the learning
    rate by the gain, and is left out.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, micro_batches: int) -> None:
        self._optimizer, self._micro_batches = optimizer, micro_batches

    def __enter__(self) -> "FairscaleAdaScale":
        self._scaled = AdaScale(self._optimizer, num_gradients_to_accumulate=self._micro_batches)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._scaled.unhook()

    def sums(self, weights: list[float]) -> tuple[()]:
        self.gain = float(self._scaled.gain())
        return ()
