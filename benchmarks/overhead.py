"""What it costs to measure an optimizer step: the time of a measured step over an unmeasured one.

    python benchmarks/overhead.py --pairs 40
    python benchmarks/overhead.py --pairs 40 --threads 1 --clock cpu    # on a busy machine
    python benchmarks/overhead.py --device cuda

Every round runs each arm once on the same model and the same batch, in random order; what is
reported is the median over the rounds of (arm / off), which a slow minute of a shared machine does
not move. A step is forward, backward, gradient clipping and AdamW (fused, as the Trainer's). Arms:

    off     the step, not measured
    null    the same again: how far from 1 a ratio lands by chance
    probe   measured: GradientProbe, then estimator, norm test and controller
    clone   measured without hooks: keep a copy of `.grad`, and subtract it from the next
    split   not measured, cut as the measured arms are; only where `off` is one micro-batch, which
            the measured arms cut in two. There, probe/split is the cost of the probe alone.

The learning rate is 0: AdamW computes what it always does, and all steps start from the same
weights, so that the two measurements can be compared as well.
"""

import argparse
import contextlib
import json
import platform
import random
import re
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import hf_adaptive_batch as hab
from hf_adaptive_batch.measure.probe import gradient_norm


TARGET = 1.05
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
MODEL = LlamaConfig(
    vocab_size=8192,
    hidden_size=384,
    intermediate_size=1024,
    num_hidden_layers=6,
    num_attention_heads=6,
    use_cache=False,
)


class CloneAndSubtract:
    """The plain way, with the probe's interface: the gradient of a micro-batch is `.grad` after it
    less `.grad` before it. Holds one copy of all gradients, which also takes the difference.
    """

    def __init__(self, parameters: list[nn.Parameter], micro_batches: int) -> None:
        self._parameters, self._left = parameters, micro_batches
        self._before: list[torch.Tensor] = []
        self._seen: list[torch.Tensor] = []

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

    def finish(self, global_batch_size: int, weights: list[float]) -> hab.GradientMoments:
        total = self._norms([p.grad for p in self._parameters])
        return hab.GradientMoments(
            workers=len(self._seen),
            global_batch_size=global_batch_size,
            small_sq_norm=len(weights) * sum(float(n.cpu().square().sum()) for n in self._seen),
            big_sq_norm=float(total.cpu().square().sum()),
        )

    @staticmethod
    def _norms(gradients: list[torch.Tensor]) -> torch.Tensor:
        """By the probe's own function: the arms differ only in how they come by a gradient."""
        return torch.stack([gradient_norm(gradient).double() for gradient in gradients])


class Bench:
    """One model, one optimizer and one batch, which all arms share."""

    def __init__(self, layout: str, device: torch.device, seed: int) -> None:
        torch.manual_seed(seed)
        sequences, length, micro_batches = map(int, layout.split("x"))
        self._model = LlamaForCausalLM(MODEL).to(device).train()
        self.parameters = list(self._model.parameters())
        self._optimizer = torch.optim.AdamW(self.parameters, lr=0.0, fused=True)
        self._size = size = sequences * micro_batches
        self._estimator, self._test = hab.NoiseScaleEstimator(), hab.NormTest(0.2)
        self._controller = hab.NormTestController(
            initial_global_batch_size=size, max_global_batch_size=32 * size
        )
        tokens = torch.randint(MODEL.vocab_size, (size, length), device=device)
        off = tokens.chunk(micro_batches)
        cut = off if len(off) > 1 else tokens.chunk(2)  # one gradient alone says nothing of noise

        def clone() -> contextlib.AbstractContextManager:
            return contextlib.nullcontext(CloneAndSubtract(self.parameters, len(cut)))

        self.arms = {
            "off": lambda: self._step(off, contextlib.nullcontext()),
            "null": lambda: self._step(off, contextlib.nullcontext()),
            "probe": lambda: self._step(cut, hab.GradientProbe(self._model)),
            "clone": lambda: self._step(cut, clone()),
        }
        if cut is not off:
            self.arms["split"] = lambda: self._step(cut, contextlib.nullcontext())

    def _step(
        self, micro_batches: tuple[torch.Tensor, ...], meter: contextlib.AbstractContextManager
    ) -> hab.GradientMoments | None:
        """One optimizer step, in the order of `AdaptiveBatchTrainer.training_step`."""
        count, size, losses, moments = len(micro_batches), self._size, [], None
        with meter as probe:
            for tokens in micro_batches:
                loss = self._model(input_ids=tokens, labels=tokens).loss / count
                loss.backward()
                losses.append(loss.detach())
                if probe is not None:
                    probe.end_micro_batch()
            finite = bool(torch.isfinite(torch.stack(losses).sum()))
            if probe is not None and finite:
                moments = probe.finish(size, [1.0] * count)
                test = self._test.evaluate(moments, self._estimator.update(moments))
                seen = hab.Observation(samples_seen=size, global_batch_size=size, test=test)
                self._controller.decide(seen)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return moments


def summary(ratios: np.ndarray) -> dict[str, float]:
    """Median, quartiles, and the 95 % percentile bootstrap interval of the median."""
    resamples = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
    low, high = np.quantile(np.median(resamples, axis=1), [0.025, 0.975])
    first, middle, third = np.quantile(ratios, [0.25, 0.5, 0.75])
    values = {"median": middle, "low": low, "high": high, "quartile_1": first, "quartile_3": third}
    return {name: round(float(value), 4) for name, value in values.items()}


def measure(layout: str, options: argparse.Namespace) -> dict:
    """All arms of one layout."""
    bench, clock = Bench(layout, options.device, options.seed), CLOCKS[options.clock]
    arms, order, shuffle = bench.arms, list(bench.arms), random.Random(options.seed).shuffle
    wait = torch.cuda.synchronize if options.device.type == "cuda" else lambda: None
    times: dict[str, list[float]] = {arm: [] for arm in order}
    for _ in range(options.warmup + options.pairs):
        shuffle(order)
        for arm in order:
            wait()
            start = clock()
            arms[arm]()
            wait()
            times[arm].append(clock() - start)
    seconds = {arm: np.array(each[options.warmup :]) for arm, each in times.items()}
    ratios = {arm: each / seconds["off"] for arm, each in seconds.items() if arm != "off"}
    if "split" in arms:
        ratios["probe/split"] = seconds["probe"] / seconds["split"]
    # S - L, the difference that the noise is read from, by both ways from the same weights.
    probe, clone = (arms[arm]().worker_variance for arm in ("probe", "clone"))
    return {
        "layout": layout,
        "parameters": sum(p.numel() for p in bench.parameters),
        "tensors": len(bench.parameters),
        "clone_extra_bytes": sum(p.numel() * p.element_size() for p in bench.parameters),
        "clone_differs_by": abs(clone / probe - 1),
        "pairs": options.pairs,
        "off_ms": round(float(np.median(seconds["off"])) * 1000, 2),
        "arms": {arm: summary(each) for arm, each in ratios.items()},
        "ratios": {arm: each.round(4).tolist() for arm, each in ratios.items()},
    }


def print_table(results: list[dict]) -> None:
    """One line per layout and arm, as Markdown, and the verdicts."""
    print("| layout  | arm         | pairs | off, ms | median | 95 % interval  | quartiles      |")
    print("|---------|-------------|------:|--------:|-------:|----------------|----------------|")
    for result in results:
        for arm, s in result["arms"].items():
            print(
                f"| {result['layout']:<7} | {arm:<11} | {result['pairs']:>5} "
                f"| {result['off_ms']:>7.1f} | {s['median']:>6.3f} "
                f"| {s['low']:.3f} .. {s['high']:.3f} "
                f"| {s['quartile_1']:.3f} .. {s['quartile_3']:.3f} |"
            )
    print()
    for result in results:
        s = result["arms"]["probe"]
        met = "met" if s["high"] <= TARGET else "missed" if s["low"] > TARGET else "undecided"
        note = "; measured in two halves, off in one" if "split" in result["arms"] else ""
        print(f"{result['layout']}: probe at most {TARGET}: {met} ({s['median']:.3f}){note}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=40, help="rounds per layout (40)")
    parser.add_argument("--warmup", type=int, default=5, help="rounds before that, not counted (5)")
    parser.add_argument(
        "--layouts",
        nargs="+",
        default=["2x64x2", "4x128x1", "1x16x4", "4x128x4"],
        help="sequences x tokens x micro-batches of a step (2x64x2 4x128x1 1x16x4 4x128x4)",
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="wall (default), or cpu: this process's own time, with --threads 1",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, batch and order (0)")
    parser.add_argument("--output", type=Path, help="write the result here, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = []
    for layout in options.layouts:
        print(f"measuring {layout} ...", flush=True)
        results.append(measure(layout, options))
    cuda, cpuinfo = options.device.type == "cuda", Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", cpuinfo.read_text() if cpuinfo.exists() else "")
    record = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf_adaptive_batch": hab.__version__,
        "device": torch.cuda.get_device_name(options.device) if cuda else "cpu",
        "processor": model[1] if model else platform.machine(),
        "threads": options.threads,
        "clock": options.clock,
        "seed": options.seed,
        "layouts": results,
    }
    print(
        f"\n{results[0]['parameters']:,} parameters in {results[0]['tensors']} tensors, float32; "
        f"{record['device']}, {record['processor']}, {record['threads']} threads\n"
    )
    print_table(results)
    memory = results[0]["clone_extra_bytes"] / 2**20
    print(f"\nExtra memory: clone {memory:.1f} MiB; probe 8 bytes per tensor and micro-batch.")
    if options.output:
        text = json.dumps(record, indent=1)
        text = re.sub(r"\[[\d\s.,]+\]", lambda numbers: re.sub(r"\s+", " ", numbers[0]), text)
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
