"""What it costs to reduce every micro-batch's gradient, and what it saves: time against memory.

    python benchmarks/sync_policy.py
    python benchmarks/sync_policy.py --clock cpu    # on a busy machine

A step that accumulates can keep the sum of gradients on every rank and reduce it once (`no_sync`),
or reduce every micro-batch's (`each`). DDP keeps whole gradients either way. FSDP keeps a shard of
them if it reduces each, and else whole ones beside it. HSDP can reduce each within a replica, and
leave the sum over its replicas for the last (`defer`), which is what the library does.

All policies of a row train the same model in turn, in random order; time is the median over the
rounds of (policy / no_sync). Memory is what a rank holds for gradients from one micro-batch to the
next, counted by its bytes: `.grad`, and what FSDP2 keeps aside (private attributes of torch 2.13).
Buckets and what lives only within one backward are not counted. Steps are not measured.
"""

import argparse
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from one_step import CLOCKS, Setting, Trained, machine, on_ranks, summary, time_arms, write_json
from torch import nn
from torch.distributed.fsdp import FSDPModule

from hf_adaptive_batch.measure.leaves import on_this_process
from hf_adaptive_batch.ranks import Ranks


POLICIES = {
    ("ddp", 2): ["no_sync", "each"],
    ("fsdp2", 2): ["no_sync", "each"],
    ("hsdp", 4): ["no_sync", "each", "defer"],
}


class HeldBytes:
    """A meter of a step: the most bytes held for gradients at the end of a micro-batch."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self.most = model, 0

    def __enter__(self) -> "HeldBytes":
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def end_micro_batch(self) -> None:
        held = [p.grad for p in self._model.parameters() if p.grad is not None]
        held = [on_this_process(gradient)[0] for gradient in held]
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                for group in module._get_fsdp_state()._fsdp_param_groups:
                    for param in group.fsdp_params:
                        held.append(param.unsharded_accumulated_grad)  # of another dtype
                        held.append(param._unsharded_param.grad)
                    held.append(group._partial_reduce_output)
        self.most = max(self.most, sum(t.nbytes for t in held if t is not None))

    def sums(self, weights: list[float]) -> tuple[()]:
        return ()


def measure(ranks: Ranks, parallel: str, options: argparse.Namespace) -> list[dict]:
    """All policies, with every accumulation."""
    results, policies = [], POLICIES[parallel, ranks.size]
    for accumulation in options.accumulation:
        layout = f"{options.micro_batch}x{accumulation}"
        if ranks.rank == 0:
            print(f"{parallel} x{ranks.size} {layout} ...", flush=True)
        trained = Trained(Setting(layout, parallel, seed=options.seed), ranks)
        held = {}
        for policy in policies:
            trained.before_last, held[policy] = policy, HeldBytes(trained.model)
            trained.step(trained.micro_batches, held[policy])
        seconds = time_arms(
            {policy: partial(run_with, trained, policy) for policy in policies},
            ranks,
            rounds=options.pairs,
            warmup=2,
            clock=options.clock,
            seed=options.seed,
        )
        results += [
            {
                "parallel": parallel,
                "ranks": ranks.size,
                "layout": layout,
                "policy": policy,
                "step_ms": round(float(np.median(seconds[policy])) * 1000, 2),
                "ratio": summary(seconds[policy] / seconds["no_sync"]),
                "gradient_bytes": held[policy].most,
                "model_bytes": sum(on_this_process(p)[0].nbytes for p in trained.parameters),
            }
            for policy in policies
        ]
    return results


def run_with(trained: Trained, policy: str) -> None:
    trained.before_last = policy
    trained.step(trained.micro_batches)


def print_table(results: list[dict]) -> None:
    print(
        "| processes | step      | policy  | step, ms | over no_sync           | gradients, MiB |"
    )
    print(
        "|-----------|-----------|---------|---------:|------------------------|---------------:|"
    )
    for result in results:
        s = result["ratio"]
        print(
            f"| {result['parallel'] + ' x' + str(result['ranks']):<9} | {result['layout']:<9} "
            f"| {result['policy']:<7} | {result['step_ms']:>8.1f} "
            f"| {s['median']:.3f} ({s['low']:.3f} .. {s['high']:.3f}) "
            f"| {result['gradient_bytes'] / 2**20:>14.1f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=6, help="rounds (6)")
    parser.add_argument(
        "--accumulation", nargs="+", type=int, default=[1, 2, 4], help="micro-batches (1 2 4)"
    )
    parser.add_argument("--micro_batch", default="2x64", help="sequences x tokens (2x64)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="wall (default), or cpu")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batch and order (0)")
    parser.add_argument("--output", type=Path, help="write the result here, as JSON")
    options = parser.parse_args()
    results = []
    for parallel, ranks in POLICIES:
        if options.device == "cuda" and torch.cuda.device_count() < ranks:
            print(f"{parallel} was left out: it takes {ranks} GPUs.")
            continue
        threads = max((os.cpu_count() or 1) // ranks, 1)
        results += on_ranks(
            measure, ranks, parallel, options, device=options.device, threads=threads
        )
    print()
    print_table(results)
    if options.output:
        record = machine(options.device) | {"clock": options.clock, "pairs": options.pairs}
        write_json(options.output, record | {"results": results})


if __name__ == "__main__":
    main()
