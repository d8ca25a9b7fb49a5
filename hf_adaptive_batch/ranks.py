"""Ranks: the processes of a run, who of them sees which data, and the little that they exchange."""

from array import array
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """The data-parallel ranks, seen from one process; by default the only one.

    Attributes:
        rank: Of this process, from 0: which share of the samples it sees.
        size: R, how many shares there are.
        device: Where the process group's tensors live.
        copies: Processes that see the same share, next to each other: the tensor-parallel ones.
        copy: This process among them, from 0.
    """

    rank: int = 0
    size: int = 1
    device: torch.device | str = "cpu"
    copies: int = 1
    copy: int = 0

    @property
    def processes(self) -> int:
        """All that run together."""
        return self.size * self.copies

    @property
    def is_first(self) -> bool:
        """Whether this is the process that speaks for all."""
        return self.rank == self.copy == 0

    def share(self, samples: int) -> range:
        """This rank's part of a round: contiguous, and at most one longer than another rank's.

        Args:
            samples: Samples of the round, over all ranks.

        Returns:
            Positions in the round; empty where there are fewer samples than ranks.
        """
        if self.size == 1:
            return range(samples)
        length, longer = divmod(samples, self.size)
        begin = self.rank * length + min(self.rank, longer)
        return range(begin, begin + length + (self.rank < longer))

    def gather(self, *numbers: float) -> list[list[float]]:
        """Tell all ranks some numbers: a small collective, and a wait for the device.

        What is computed from the answer in one order is bitwise the same on all ranks, so that
        they cannot disagree on what follows from it.

        Args:
            *numbers: As many on every rank; integers up to 2^53 arrive exactly.

        Returns:
            One row of float64 numbers per rank, in the order of the ranks.
        """
        if self.processes == 1:
            return [[float(number) for number in numbers]]
        mine = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        rows = [torch.empty_like(mine) for _ in range(self.processes)]
        dist.all_gather(rows, mine)
        return torch.stack(rows[:: self.copies]).tolist()

    def total(self, *numbers: float) -> list[float]:
        """Add up some numbers over all processes: one all-reduce, whatever their number.

        Args:
            *numbers: As many on every process; integers up to 2^53 stay exact.

        Returns:
            The float64 sums, on every process.
        """
        if self.processes == 1:
            return [float(number) for number in numbers]
        sums = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return sums.tolist()

    def alike(self, *numbers: float) -> bool:
        """Whether all processes hold the same numbers: one all-reduce, whatever their number.

        Args:
            *numbers: As many on every process; integers up to 2^53 are told apart.

        Returns:
            The same answer on every process.
        """
        if self.processes == 1:
            return True
        both = torch.tensor([*numbers, *(-n for n in numbers)], dtype=torch.float64)
        both = both.to(self.device)
        dist.all_reduce(both, op=dist.ReduceOp.MAX)
        largest, smallest = both.chunk(2)
        return bool((largest == -smallest).all())

    def gather_objects(self, mine: Any) -> list[Any]:
        """Tell all ranks any plain data; for what happens seldom, such as saving.

        Args:
            mine: What can be pickled.

        Returns:
            One object per rank, in the order of the ranks.
        """
        if self.processes == 1:
            return [mine]
        objects = [None] * self.processes
        dist.all_gather_object(objects, mine)
        return objects[:: self.copies]

    def of_first(self, numbers: "array[int]") -> "array[int]":
        """The first process's integers, for all: a broadcast.

        Args:
            numbers: As many on every process.

        Returns:
            Those of process 0.
        """
        if self.processes == 1:
            return numbers
        tensor = torch.frombuffer(numbers, dtype=torch.int64).to(self.device, copy=True)
        dist.broadcast(tensor, src=0)
        return array("q", tensor.cpu().numpy().tobytes())


def leave_together() -> None:
    """End the process group, if there is one, when all processes have come to their end.

    One that goes while others still listen makes gloo abort them.
    """
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
