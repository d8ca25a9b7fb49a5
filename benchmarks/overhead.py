"""What it costs to measure an optimizer step: the time of a measured step over an unmeasured one.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --clock cpu       # on a busy machine
    python benchmarks/overhead.py --device cuda     # one rank per GPU, NCCL

In one process, and on two with DDP and with FSDP2 (gloo). Every round runs each arm once on the
same model and the same batch, in random order; what is reported is the median over the rounds of
(arm / off), which a slow minute of a shared machine does not move. A step is forward, backward, the
sum of losses and tokens over the ranks, gradient clipping and AdamW (fused, as the Trainer's).
Arms:

    off       the step, not measured
    null      the same again: how far from 1 a ratio lands by chance
    probe     measured: hooks, norms, their sums in the same all-reduce, estimator, norm test,
              controller, and the first rank's decision for all
    clone     measured without hooks: keep a copy of `.grad`, and subtract it from the next (single)
    adascale  measured by fairscale's AdaScale, if it is installed (single, ddp)
    buckets   measured by a communication hook, on a copy of the model of its own (ddp)
    split     not measured, cut as the measured arms are; only where `off` is one micro-batch, which
              the measured arms cut in two. There, probe/split is the cost of the probe alone.

The learning rate is 0: AdamW computes what it always does, and all steps start from the same
weights, so that the measurements can be compared as well.
"""

import argparse
import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
from one_step import CLOCKS, Setting, Trained, machine, on_ranks, summary, time_arms, write_json
from peers import AdaScale, BucketNorms, CloneAndSubtract, FairscaleAdaScale

import hf_adaptive_batch as hab
from hf_adaptive_batch.ranks import Ranks


TARGET = 1.05


def arms_of(trained: Trained, setting: Setting, ranks: Ranks) -> dict[str, partial]:
    """The steps to compare, by name."""
    off = cut = trained.micro_batches
    if len(off) * ranks.size == 1:  # one gradient alone says nothing of noise
        cut = off[0].chunk(2)
    probe = hab.GradientProbe(trained.model, processes=ranks.processes)
    arms = {
        "off": partial(trained.step, off),
        "null": partial(trained.step, off),
        "probe": partial(trained.step, cut, probe),
    }
    if setting.parallel == "single":
        clone = CloneAndSubtract(trained.parameters, len(cut))
        arms["clone"] = partial(trained.step, cut, clone)
    if setting.parallel in ("single", "ddp") and AdaScale is not None:
        adascale = FairscaleAdaScale(trained.optimizer, len(cut))
        arms["adascale"] = partial(trained.step, cut, adascale)
    # Reduced with every micro-batch, a bucket holds a sum already reduced and a local gradient.
    if setting.parallel == "ddp" and ranks.size > 1 and setting.before_last == "no_sync":
        hooked = Trained(setting, ranks)
        arms["buckets"] = partial(hooked.step, off, BucketNorms(hooked.model))
    if cut is not off:
        arms["split"] = partial(trained.step, cut)
    return arms


def measure(ranks: Ranks, settings: list[Setting], options: argparse.Namespace) -> list[dict]:
    """All arms of some settings, on every rank."""
    results = []
    for setting in settings:
        trained = Trained(setting, ranks)
        arms = arms_of(trained, setting, ranks)
        seconds = time_arms(
            arms,
            ranks,
            rounds=options.pairs,
            warmup=options.warmup,
            clock=options.clock,
            seed=options.seed,
        )
        ratios = {arm: each / seconds["off"] for arm, each in seconds.items() if arm != "off"}
        if "split" in arms:
            ratios["probe/split"] = seconds["probe"] / seconds["split"]
        results.append(
            {
                "parallel": setting.parallel,
                "ranks": ranks.size,
                "layout": setting.layout,
                "parameters": sum(p.numel() for p in trained.parameters),
                "tensors": len(trained.parameters),
                "off_ms": round(float(np.median(seconds["off"])) * 1000, 2),
                "variance_differs_by": _differences(arms),
                "arms": {arm: summary(each) for arm, each in ratios.items()},
                "ratios": {arm: each.round(4).tolist() for arm, each in ratios.items()},
            }
        )
        if ranks.rank == 0:
            medians = (f"{arm} {np.median(each):.3f}" for arm, each in ratios.items())
            print(f"{_processes(results[-1])} {setting.layout}: {', '.join(medians)}", flush=True)
    return results


def _differences(arms: dict[str, partial]) -> dict[str, float]:
    """S - L, which the noise is read from, from the same weights: relative to the probe's."""
    probe = arms["probe"]().gradient_variance
    others = [arm for arm in ("clone", "buckets") if arm in arms]
    return {arm: abs(arms[arm]().gradient_variance / probe - 1) for arm in others}


def print_table(results: list[dict]) -> None:
    """One line per setting and arm, as Markdown, and the verdicts."""
    print(
        "| processes | layout  | arm         | off, ms | median | 95 % interval  | quartiles      |"
    )
    print(
        "|-----------|---------|-------------|--------:|-------:|----------------|----------------|"
    )
    for result in results:
        for arm, s in result["arms"].items():
            print(
                f"| {_processes(result):<9} | {result['layout']:<7} | {arm:<11} "
                f"| {result['off_ms']:>7.1f} | {s['median']:>6.3f} "
                f"| {s['low']:.3f} .. {s['high']:.3f} "
                f"| {s['quartile_1']:.3f} .. {s['quartile_3']:.3f} |"
            )
    print()
    for result in results:
        s = result["arms"]["probe"]
        met = "met" if s["high"] <= TARGET else "missed" if s["low"] > TARGET else "undecided"
        null = result["arms"]["null"]
        if max(null["high"] - 1, 1 - null["low"]) > TARGET - 1:
            met = "undecided, as chance alone moves a ratio by more"
        note = "; measured in two halves, off in one" if "split" in result["arms"] else ""
        name = f"{_processes(result)} {result['layout']}"
        print(f"{name}: probe at most {TARGET}: {met} ({s['median']:.3f}){note}")
    if AdaScale is None:
        print("adascale was left out: fairscale is not installed.")


def _processes(result: dict) -> str:
    return result["parallel"] + (f" x{result['ranks']}" if result["ranks"] > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=25, help="rounds per layout (25)")
    parser.add_argument("--warmup", type=int, default=3, help="rounds before that, not counted (3)")
    parser.add_argument(
        "--layouts",
        nargs="+",
        default=["2x64x2", "2x128x2"],
        help="sequences x tokens x micro-batches of a rank's step (2x64x2 2x128x2)",
    )
    parser.add_argument(
        "--parallel",
        nargs="+",
        choices=("single", "ddp", "fsdp2"),
        default=["single", "ddp", "fsdp2"],
    )
    parser.add_argument("--ranks", type=int, help="of ddp and fsdp2 (2, on GPUs as many)")
    parser.add_argument(
        "--sync_each_batch",
        action="store_true",
        help="reduce every micro-batch's gradient, not only the step's; without buckets",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="of torch, over all ranks (one per core)")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="wall (default), or cpu: the processes' own time, on one thread each",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, batch and order (0)")
    parser.add_argument("--output", type=Path, help="write the result here, as JSON")
    options = parser.parse_args()
    ranks = options.ranks or (torch.cuda.device_count() if options.device == "cuda" else 2)
    before_last = "each" if options.sync_each_batch else "no_sync"
    results = []
    for parallel in options.parallel:
        size = 1 if parallel == "single" else ranks
        threads = (options.threads or os.cpu_count() or 1) // size if options.clock == "wall" else 1
        settings = [
            Setting(layout, parallel, before_last, seed=options.seed) for layout in options.layouts
        ]
        results += on_ranks(
            measure, size, settings, options, device=options.device, threads=max(threads, 1)
        )
    record = machine(options.device) | {
        "threads": options.threads or os.cpu_count(),
        "clock": options.clock,
        "seed": options.seed,
        "pairs": options.pairs,
        "before_last": before_last,
        "results": results,
    }
    print(
        f"\n{results[0]['parameters']:,} parameters in {results[0]['tensors']} tensors, float32; "
        f"{record['device']}, {record['processor']}; "
        f"{options.pairs} rounds, {options.clock} clock\n"
    )
    print_table(results)
    if options.output:
        write_json(options.output, record)


if __name__ == "__main__":
    main()
