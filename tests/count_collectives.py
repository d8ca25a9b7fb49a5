"""Counts what one process of many says to the others in a step, with a process group that is fake.

    python tests/count_collectives.py WORLD_SIZE [TP_SIZE]

torch's fake process group answers every collective at once with this process's own data: the step
runs as on WORLD_SIZE processes, and what it computes means nothing. Prints one JSON object.
"""

from __future__ import annotations

import json
import sys
from array import array
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hf_adaptive_batch.measure.probe import GradientProbe
from hf_adaptive_batch.ranks import Ranks
from tests.cases import llama


class Collectives(TorchDispatchMode):
    """Keeps each collective's name, and bytes that it sends."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function.namespace == "c10d":
            tensors = [t for arg in args for t in (arg if isinstance(arg, list) else [arg])]
            sent = [t.nbytes for t in tensors if isinstance(t, torch.Tensor)]
            self.seen.append((function.__name__.split(".")[0].strip("_"), sum(sent)))
        return function(*args, **(kwargs or {}))


def count(world_size: int, tp_size: int) -> dict[str, Any]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    ranks = Ranks(0, world_size // tp_size, "cpu", tp_size)
    model = llama(layers=2)
    mesh = init_device_mesh("cpu", (world_size // tp_size,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    probe = GradientProbe(model, processes=ranks.processes, copies=ranks.copies)
    tokens = torch.randint(0, 16, (2, 8))

    def backward() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()

    def plain() -> None:
        for _ in range(2):
            backward()
        ranks.total(1.0, 16.0, 1.0)  # the loss, tokens, and whether the next step is measured

    def measured() -> None:
        with probe:
            for _ in range(2):
                backward()
                probe.end_micro_batch()
            ranks.total(1.0, 16.0, 1.0, *probe.sums([1.0, 1.0]))
        ranks.of_first(array("q", [32, 1]))  # the decision

    found: dict[str, Any] = {}
    for name, step in (
        ("plain", plain),
        ("first measured", measured),
        ("measured", measured),
        ("stream", lambda: ranks.alike(7, 16, 2, 0)),
        ("split stream", lambda: ranks.total(0, 1, *[8] * 2)),
    ):
        with Collectives() as collectives:
            step()
        model.zero_grad()
        found[name] = {
            "calls": Counter(name for name, _ in collectives.seen),
            "bytes": sum(sent for _, sent in collectives.seen),
            "own": [seen for seen in collectives.seen if seen[0] in ("allreduce", "broadcast")],
        }
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(count(int(sys.argv[1]), int((sys.argv[2:] or ["1"])[0]))))
