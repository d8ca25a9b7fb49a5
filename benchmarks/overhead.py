"""What it costs to measure an optimizer step: the time of a measured step over an unmeasured one.

    python benchmarks/overhead.py --pairs 40
    python benchmarks/overhead.py --pairs 150 --output benchmarks/results/overhead-cpu.json
    python benchmarks/overhead.py --device cuda

Every round runs each arm once on the same model and the same batch, in random order; what is
reported is the median over the rounds of (arm / off), which a slow minute of a shared machine does
not move. A step is forward, backward, gradient clipping and AdamW (fused, as the Trainer's). Arms:

    off     the step, not measured
    null    the same again: how far from 1 a ratio lands by chance
    probe   measured: GradientProbe, then estimator, norm test and controller
    clone   measured without hooks: keep a copy of `.grad`, and subtract it from the next
    split   not measured, cut as the measured arms are; only where `off` is one micro-batch

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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import hf_adaptive_batch
from hf_adaptive_batch import (
    GradientMoments,
    GradientProbe,
    NoiseScaleEstimator,
    NormTest,
    NormTestController,
    Observation,
)
from hf_adaptive_batch.measure.probe import gradient_norm


TARGET = 1.05
VOCABULARY = 8192


@dataclass(frozen=True)
class Layout:
    """How a step is cut: `sequences` of `tokens` in each of its `micro_batches`."""

    sequences: int
    tokens: int
    micro_batches: int

    def __str__(self) -> str:
        return f"{self.sequences}x{self.tokens} x {self.micro_batches}"

    @property
    def is_split(self) -> bool:
        """Whether measuring cuts the only micro-batch in two, for want of a second gradient."""
        return self.micro_batches == 1


class CloneAndSubtract:
    """The plain way, with the probe's interface: the gradient of a micro-batch is `.grad` after it
    less `.grad` before it. Holds one copy of all gradients, which also takes the difference.
    """

    def __init__(self, model: nn.Module, micro_batches: int) -> None:
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._left = micro_batches
        self._before: list[torch.Tensor] = []
        self._seen: list[torch.Tensor] = []

    def end_micro_batch(self) -> None:
        gradients = [p.grad for p in self._parameters]
        if self._before:
            torch._foreach_sub_(self._before, gradients)
        # The probe's own norm, so that the arms differ only in how they come by a gradient.
        self._seen.append(self._norms(self._before or gradients))
        self._left -= 1
        if self._before and self._left:
            torch._foreach_copy_(self._before, gradients)
        elif self._left:
            self._before = [gradient.clone() for gradient in gradients]

    def finish(self, global_batch_size: int, weights: list[float]) -> GradientMoments:
        total = self._norms([p.grad for p in self._parameters])
        return GradientMoments(
            workers=len(self._seen),
            global_batch_size=global_batch_size,
            small_sq_norm=len(weights) * sum(float(n.cpu().square().sum()) for n in self._seen),
            big_sq_norm=float(total.cpu().square().sum()),
        )

    @staticmethod
    def _norms(gradients: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([gradient_norm(gradient).double() for gradient in gradients])


class Bench:
    """One model, one optimizer and one batch, which all arms share."""

    def __init__(self, layout: Layout, device: torch.device, seed: int) -> None:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=384,
            intermediate_size=1024,
            num_hidden_layers=6,
            num_attention_heads=6,
            use_cache=False,
        )
        self._device = device
        self._model = LlamaForCausalLM(config).to(device).train()
        self.parameters = list(self._model.parameters())
        self._optimizer = torch.optim.AdamW(self.parameters, lr=0.0, fused=True)
        self._size = size = layout.sequences * layout.micro_batches
        self._estimator, self._test = NoiseScaleEstimator(), NormTest(0.2)
        self._controller = NormTestController(
            initial_global_batch_size=size, max_global_batch_size=32 * size
        )
        tokens = torch.randint(VOCABULARY, (size, layout.tokens), device=device)
        whole = tokens.chunk(layout.micro_batches)
        cut = tokens.chunk(2) if layout.is_split else whole
        self.arms: dict[str, Callable[[], GradientMoments | None]] = {
            "off": lambda: self._step(whole),
            "null": lambda: self._step(whole),
            "probe": lambda: self._step(cut, GradientProbe(self._model)),
            "clone": lambda: self._step(
                cut, contextlib.nullcontext(CloneAndSubtract(self._model, len(cut)))
            ),
        }
        if layout.is_split:
            self.arms["split"] = lambda: self._step(cut)

    def _step(
        self,
        micro_batches: tuple[torch.Tensor, ...],
        measurement: contextlib.AbstractContextManager = contextlib.nullcontext(),  # noqa: B008
    ) -> GradientMoments | None:
        """One optimizer step, in the order of `AdaptiveBatchTrainer.training_step`."""
        count, losses, moments = len(micro_batches), [], None
        with measurement as probe:
            for tokens in micro_batches:
                loss = self._model(input_ids=tokens, labels=tokens).loss / count
                loss.backward()
                losses.append(loss.detach())
                if probe is not None:
                    probe.end_micro_batch()
            finite = bool(torch.isfinite(torch.stack(losses).sum()))
            if probe is not None and finite:
                size = self._size
                moments = probe.finish(size, [1.0] * count)
                test = self._test.evaluate(moments, self._estimator.update(moments))
                self._controller.decide(
                    Observation(samples_seen=size, global_batch_size=size, test=test)
                )
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return moments

    def seconds(self, arm: str) -> float:
        """How long one step of an arm takes; the device's queue is empty before and after."""
        self._synchronise()
        start = time.perf_counter()
        self.arms[arm]()
        self._synchronise()
        return time.perf_counter() - start

    def _synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def summary(ratios: np.ndarray, seed: int) -> dict[str, float]:
    """Median, quartiles, and the 95 % percentile bootstrap interval of the median."""
    resamples = np.random.default_rng(seed).choice(ratios, (10_000, len(ratios)))
    low, high = np.quantile(np.median(resamples, axis=1), [0.025, 0.975])
    first, middle, third = np.quantile(ratios, [0.25, 0.5, 0.75])
    values = {"median": middle, "low": low, "high": high, "quartile_1": first, "quartile_3": third}
    return {name: round(float(value), 4) for name, value in values.items()}


def measure(layout: Layout, device: torch.device, pairs: int, warmup: int, seed: int) -> dict:
    """All arms of one layout."""
    bench = Bench(layout, device, seed)
    order = list(bench.arms)
    for arm in order * warmup:
        bench.seconds(arm)
    # Both measurements, from the same weights: S - L, the difference that the noise is read from.
    probe, clone = (bench.arms[arm]().worker_variance for arm in ("probe", "clone"))
    rounds: dict[str, list[float]] = {arm: [] for arm in order}
    shuffle = random.Random(seed).shuffle
    for _ in range(pairs):
        shuffle(order)
        for arm in order:
            rounds[arm].append(bench.seconds(arm))
    seconds = {arm: np.array(times) for arm, times in rounds.items()}
    ratios = {arm: times / seconds["off"] for arm, times in seconds.items() if arm != "off"}
    return {
        "layout": str(layout),
        "split_when_measured": layout.is_split,
        "parameters": sum(p.numel() for p in bench.parameters),
        "tensors": len(bench.parameters),
        "clone_extra_bytes": sum(p.numel() * p.element_size() for p in bench.parameters),
        "pairs": pairs,
        "off_ms": round(float(np.median(seconds["off"])) * 1000, 2),
        "clone_against_probe_error": abs(clone / probe - 1),
        "arms": {arm: summary(values, seed) for arm, values in ratios.items()},
        "ratios": {arm: values.round(4).tolist() for arm, values in ratios.items()},
    }


def processor() -> str:
    """The processor's name as Linux gives it, elsewhere its architecture."""
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        if found := re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE):
            return found[1]
    return platform.machine()


def print_table(results: list[dict]) -> None:
    """One line per layout and arm, as Markdown, and the verdicts."""
    print("| layout    | arm   | pairs | off, ms | median | 95 % interval  | quartiles      |")
    print("|-----------|-------|------:|--------:|-------:|----------------|----------------|")
    for result in results:
        start = f"| {result['layout']:<9} | {{:<5}} | {result['pairs']:>5} | {result['off_ms']:>7.1f}"
        for arm, s in result["arms"].items():
            interval = f"{s['low']:.3f} .. {s['high']:.3f}"
            quartiles = f"{s['quartile_1']:.3f} .. {s['quartile_3']:.3f}"
            print(start.format(arm) + f" | {s['median']:>6.3f} | {interval} | {quartiles} |")
    print()
    for result in results:
        s = result["arms"]["probe"]
        met = "met" if s["high"] <= TARGET else "missed" if s["low"] > TARGET else "undecided"
        note = "; measured in two halves, off in one" if result["split_when_measured"] else ""
        print(f"{result['layout']}: probe at most {TARGET}: {met} ({s['median']:.3f}){note}")
    print(
        f"\nExtra memory: clone {results[0]['clone_extra_bytes'] / 2**20:.1f} MiB, one copy of the "
        "gradients;\nprobe 8 bytes per tensor and micro-batch, and one tensor's row norms at a time."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=40, help="rounds per layout (40)")
    parser.add_argument("--warmup", type=int, default=5, help="rounds before that, not counted (5)")
    parser.add_argument(
        "--layouts",
        nargs="+",
        default=["2x64x2", "4x128x1", "1x16x4", "4x128x4"],
        metavar="SxTxM",
        help="sequences x tokens x micro-batches (2x64x2 4x128x1 1x16x4 4x128x4)",
    )
    parser.add_argument("--device", type=torch.device, default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batch and order (0)")
    parser.add_argument("--output", type=Path, help="write the result here, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = []
    for text in options.layouts:
        layout = Layout(*map(int, text.split("x")))
        print(f"measuring {layout} ...", flush=True)
        results.append(
            measure(layout, options.device, options.pairs, options.warmup, options.seed)
        )
    cuda = options.device.type == "cuda"
    record = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf_adaptive_batch": hf_adaptive_batch.__version__,
        "device": torch.cuda.get_device_name(options.device) if cuda else "cpu",
        "processor": processor(),
        "threads": options.threads,
        "seed": options.seed,
        "layouts": results,
    }
    print(
        f"\n{results[0]['parameters']:,} parameters in {results[0]['tensors']} tensors, float32; "
        f"{record['device']}, {record['processor']}, {record['threads']} threads\n"
    )
    print_table(results)
    if options.output:
        text = json.dumps(record, indent=1)
        text = re.sub(r"\[[\d\s.,]+\]", lambda numbers: re.sub(r"\s+", " ", numbers[0]), text)
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
