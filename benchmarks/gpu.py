"""What it costs to measure every step on a GPU, in time and memory: one JSON line per setting.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --dry_run    # a tiny model on the CPU: whether it runs, not how fast

A Llama of 135 million parameters in bf16, in one process and as FSDP2 with one rank, with and
without torch.compile. `ratio` is a measured step over an unmeasured one, as in `overhead.py`;
`null` the unmeasured one over itself. Peak memory is that of one step of each.
"""

import argparse
import json
from functools import partial

import numpy as np
import torch
from one_step import Setting, Trained, machine, on_ranks, summary, time_arms
from transformers import LlamaConfig

import hf_adaptive_batch as hab
from hf_adaptive_batch.ranks import Ranks


LARGE = LlamaConfig(
    vocab_size=32768,
    hidden_size=768,
    intermediate_size=2048,
    num_hidden_layers=12,
    num_attention_heads=12,
    use_cache=False,
)
TINY = LlamaConfig(
    vocab_size=256,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    use_cache=False,
)


def measure(ranks: Ranks, setting: Setting, options: argparse.Namespace) -> dict:
    """One setting, in a process of its own."""
    trained = Trained(setting, ranks)
    step = partial(trained.step, trained.micro_batches)
    arms = {
        "off": step,
        "null": step,
        "probe": partial(step, hab.GradientProbe(trained.model, processes=ranks.processes)),
    }
    seconds = time_arms(arms, ranks, rounds=options.pairs, warmup=options.warmup)
    peaks = {arm: _peak_memory(arms[arm], ranks) for arm in ("off", "probe")}
    return {
        "parallel": setting.parallel,
        "compiled": setting.compiled,
        "layout": setting.layout,
        "parameters": sum(p.numel() for p in trained.parameters),
        "off_ms": round(float(np.median(seconds["off"])) * 1000, 3),
        "ratio": summary(seconds["probe"] / seconds["off"]),
        "null": summary(seconds["null"] / seconds["off"]),
        "peak_bytes": peaks,
        "noise_trace": arms["probe"]().noise_trace,
    }


def _peak_memory(step: partial, ranks: Ranks) -> int | None:
    if torch.device(ranks.device).type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=60, help="rounds (60)")
    parser.add_argument("--warmup", type=int, default=10, help="rounds not counted (10)")
    parser.add_argument(
        "--layouts",
        nargs="+",
        default=["1x512x4", "8x1024x2"],
        help="sequences x tokens x micro-batches of a step (1x512x4 8x1024x2)",
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="a tiny model on the CPU, few rounds, 2x16x2"
    )
    options = parser.parse_args()
    device, config = "cuda", LARGE
    if options.dry_run:
        device, config = "cpu", TINY
        options.pairs, options.warmup, options.layouts = 5, 2, ["2x16x2"]
    print(json.dumps(machine(device) | {"pairs": options.pairs}), flush=True)
    for layout in options.layouts:
        for parallel in ("single", "fsdp2"):
            for compiled in (False, True):
                setting = Setting(layout, parallel, config=config, bf16=True, compiled=compiled)
                result = on_ranks(measure, 1, setting, options, device=device)
                print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
