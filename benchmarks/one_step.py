"""What the benchmarks of training share: one optimizer step as the Trainer runs it, on one process
or several, and the clock around it.
"""

import contextlib
import json
import os
import platform
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing
import transformers
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import hf_adaptive_batch as hab
from hf_adaptive_batch.apply.clock import TrainingClock
from hf_adaptive_batch.measure.moments import MomentSums
from hf_adaptive_batch.ranks import Ranks
from hf_adaptive_batch.run import AdaptiveRun


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
MODEL = LlamaConfig(
    vocab_size=8192,
    hidden_size=384,
    intermediate_size=1024,
    num_hidden_layers=6,
    num_attention_heads=6,
    use_cache=False,
)


class Setting(NamedTuple):
    """What is trained and how.

    Attributes:
        layout: sequences x tokens x micro-batches of a step, on every rank.
        parallel: single, ddp, fsdp2 or hsdp (two replicas).
        before_last: What is done with the gradients of the micro-batches before a step's last.
            no_sync: they are added up locally, reduced with the last;
            each: they are reduced at once;
            defer: reduced at once within a replica, over the replicas with the last.
        config: The model.
        bf16: Computed in; as the Trainer's flag, with fp32 weights and reductions.
        compiled: By torch.compile.
        seed: Of weights and samples.
    """

    layout: str
    parallel: str = "single"
    before_last: str = "no_sync"
    config: LlamaConfig = MODEL
    bf16: bool = False
    compiled: bool = False
    seed: int = 0


class Trained:
    """A model, its optimizer, and what the Trainer and the library do in a step with them."""

    def __init__(self, setting: Setting, ranks: Ranks) -> None:
        self._ranks, self._device = ranks, torch.device(ranks.device)
        self.before_last, self._bf16 = setting.before_last, setting.bf16
        torch.manual_seed(setting.seed)
        self.model = _wrapped(LlamaForCausalLM(setting.config).to(self._device).train(), setting)
        if setting.compiled:
            self.model.compile()
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0, fused=True)
        sequences, length, micro_batches = map(int, setting.layout.split("x"))
        self.samples = size = sequences * micro_batches * ranks.size
        self.run = AdaptiveRun(
            initial_plan=None,
            max_micro_batch_size=None,
            clock=TrainingClock(
                epoch_samples=None,
                initial_global_batch_size=size,
                initial_round_size=sequences * ranks.size,
                budget_steps=1,
            ),
            ranks=ranks,
            seed=setting.seed,
            loader=None,
            controller=hab.NormTestController(
                initial_global_batch_size=size, max_global_batch_size=32 * size
            ),
            criterion=hab.NormTest(0.2),
            estimator=hab.NoiseScaleEstimator(),
            records=None,
        )
        tokens = torch.randint(setting.config.vocab_size, (size, length), device=self._device)
        self.micro_batches = tokens.chunk(ranks.size)[ranks.rank].chunk(micro_batches)

    def step(self, micro_batches: Sequence[torch.Tensor], meter: Any = None) -> Any:
        """One optimizer step, in the order of `AdaptiveBatchTrainer._run_step`.

        Args:
            micro_batches: Token ids.
            meter: Measures it: a GradientProbe, or what looks like one.

        Returns:
            The moments, if the meter made sums of which there are some.
        """
        count, losses, sums = len(micro_batches), [], ()
        with meter or contextlib.nullcontext():
            for index, tokens in enumerate(micro_batches):
                last = index == count - 1
                with contextlib.nullcontext() if last else self._no_reduction():
                    with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
                        loss = self.model(input_ids=tokens, labels=tokens).loss / count
                    loss.backward()
                losses.append(loss.detach())
                if meter is not None:
                    meter.end_micro_batch()
            if meter is not None:
                sums = meter.sums([1.0] * count)
        loss, tokens = torch.stack(losses).sum(), sum(batch.numel() for batch in micro_batches)
        loss, tokens, *seen = self.run.exchange(float(loss), tokens, *sums)
        moments = self._adapt(MomentSums(*seen)) if seen else None
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return moments

    def _adapt(self, sums: MomentSums) -> Any:
        """`hf_adaptive_batch.adapt.adapt`, without the plan and the record."""
        moments = hab.GradientMoments.of_sums(
            sums, global_batch_size=self.samples, data_parallel_size=self._ranks.size
        )
        test = self.run.criterion.evaluate(moments, self.run.estimator.update(moments))
        seen = hab.Observation(samples_seen=self.samples, global_batch_size=self.samples, test=test)
        self.run.agreed(self.run.controller.decide(seen))
        return moments

    def _no_reduction(self) -> AbstractContextManager[Any]:
        if self.before_last == "each":
            return contextlib.nullcontext()
        if isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        if isinstance(self.model, FSDPModule):
            return self._switched_off(
                self.model.set_requires_all_reduce
                if self.before_last == "defer"
                else self.model.set_requires_gradient_sync
            )
        return contextlib.nullcontext()

    @staticmethod
    @contextlib.contextmanager
    def _switched_off(switch: Callable[[bool], None]) -> Iterator[None]:
        switch(False)
        yield
        switch(True)


def _wrapped(model: nn.Module, setting: Setting) -> nn.Module:
    """As the Trainer wraps it."""
    device, size = next(model.parameters()).device, dist.get_world_size()
    if setting.parallel == "single":
        return model
    if setting.parallel == "ddp":
        cuda = device.type == "cuda"
        return DistributedDataParallel(model, device_ids=[device] if cuda else None)
    shape, names = ((size,), ("shard",))
    if setting.parallel == "hsdp":
        shape, names = (2, size // 2), ("replicate", "shard")
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    precision = MixedPrecisionPolicy()
    if setting.bf16:
        precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=precision)
    return model


def time_arms(
    arms: dict[str, Callable[[], Any]],
    ranks: Ranks,
    *,
    rounds: int,
    warmup: int,
    clock: str = "wall",
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Run every arm once in each round, in a random order on which all ranks agree.

    Returns:
        Seconds of every round: by the clock on the wall of the slowest rank, by processor time of
        all ranks together.
    """
    now, order, shuffle = CLOCKS[clock], list(arms), random.Random(seed).shuffle
    cuda = torch.device(ranks.device).type == "cuda"
    wait = torch.cuda.synchronize if cuda else lambda: None
    times: dict[str, list[float]] = {arm: [] for arm in order}
    for _ in range(warmup + rounds):
        shuffle(order)
        for arm in order:
            wait()
            dist.barrier()
            start = now()
            arms[arm]()
            wait()
            times[arm].append(now() - start)
    all_ranks = ranks.gather_objects(times)
    together = np.max if clock == "wall" else np.sum
    return {arm: together([row[arm] for row in all_ranks], axis=0)[warmup:] for arm in arms}


def summary(ratios: np.ndarray) -> dict[str, float]:
    """Median, quartiles, and the 95 % percentile bootstrap interval of the median."""
    resamples = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
    low, high = np.quantile(np.median(resamples, axis=1), [0.025, 0.975])
    first, middle, third = np.quantile(ratios, [0.25, 0.5, 0.75])
    values = {"median": middle, "low": low, "high": high, "quartile_1": first, "quartile_3": third}
    return {name: round(float(value), 4) for name, value in values.items()}


def on_ranks(
    work: Callable[..., Any], size: int, *arguments: Any, device: str = "cpu", threads: int = 1
) -> Any:
    """Run a function on new processes, with gloo or, on GPUs, NCCL.

    Args:
        work: Called with the `Ranks` and the arguments; of the module's top level.
        size: How many processes.
        *arguments: Can be pickled.
        device: cpu or cuda.
        threads: Of torch, in each process.

    Returns:
        What the first one returned, by way of JSON.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(
            _process, (work, size, arguments, device, threads, folder), nprocs=size
        )
        return json.loads(Path(folder, "result.json").read_text())


def _process(
    rank: int,
    work: Callable[..., Any],
    size: int,
    arguments: tuple[Any, ...],
    device: str,
    threads: int,
    folder: str,
) -> None:
    torch.set_num_threads(threads)
    if device == "cuda":
        device = f"cuda:{rank}"
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "gloo" if device == "cpu" else "nccl",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=size,
    )
    result = work(Ranks(rank, size, device), *arguments)
    if rank == 0:
        Path(folder, "result.json").write_text(json.dumps(result))
    dist.barrier()
    if size == 1:
        dist.destroy_process_group()
        return
    sys.stdout.flush()
    os._exit(0)  # gloo may hang or abort in its destructors


def machine(device: str) -> dict[str, str]:
    """Where and with what a figure was measured."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", cpuinfo.read_text() if cpuinfo.exists() else "")
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf_adaptive_batch": hab.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "processor": model[1] if model else platform.machine(),
    }


def write_json(path: Path, record: Any) -> None:
    """Lists of numbers on one line each."""
    text = json.dumps(record, indent=1)
    text = re.sub(r"\[[\d\s.,]+\]", lambda numbers: re.sub(r"\s+", " ", numbers[0]), text)
    path.write_text(text + "\n", encoding="utf-8")
