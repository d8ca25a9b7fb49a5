"""Measures the same samples on several real processes with gloo, laid out in many ways.

A job is trained twice on the same processes, with the probe and without, in the order in which the
Trainer does it. The processes are forked from one that has imported everything and run nothing.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import multiprocessing
import os
import socket
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

from hf_adaptive_batch.decide import NoiseScaleEstimator, NormTest, NormTestController
from hf_adaptive_batch.decide.controllers import Observation
from hf_adaptive_batch.measure import probe as probe_module
from hf_adaptive_batch.measure.leaves import GradientLeaves
from hf_adaptive_batch.measure.moments import GradientMoments, MomentSums
from hf_adaptive_batch.measure.probe import GradientProbe
from tests import layouts
from tests.layouts import Laid


# What was just imported need not be searched for tensors.
gc.collect()
gc.freeze()

PATIENCE = 180.0  # seconds for all jobs of one launch
MICRO_BATCHES = 4  # of a step, over all ranks
SAMPLES = 8  # of a step


@dataclass(frozen=True)
class Job:
    """Some AdamW steps, the same on all processes.

    Attributes:
        name: For the results.
        layout: A function of `tests.layouts`.
        options: Its keyword arguments.
        model: A key of `MODELS`.
        data: A key of `LENGTHS`.
        loss: "tokens" weighs target tokens alike, "mean" micro-batches.
        policy: When gradients are reduced over the ranks: a key of `layouts.POLICIES`.
        precision: "float32", or "autocast" to bfloat16, or "bfloat16" for the weights that compute.
        loss_scale: Of a gradient scaler.
        between: What happens before a step: a key of `BETWEEN`.
        steps: How many.
        interval: From one measured step to the next.
        fault: A key of `FAULTS`: what is done wrong, for a test to notice.
    """

    name: str
    layout: str
    options: dict[str, Any] = field(default_factory=dict)
    model: str = "untied"
    data: str = "even"
    loss: str = "tokens"
    policy: str = "last"
    precision: str = "float32"
    loss_scale: float = 1.0
    between: str = "nothing"
    steps: int = 2
    interval: int = 1
    fault: str | None = None


# ---------------------------------------------------------------------------------------- data

# Target tokens and the first one of each sample; what comes after them is no target.
LENGTHS = {
    "even": [[8, 8]] * 4,
    "uneven": [[8, 3], [4, 2], [7, 8], [2, 5]],
    "one without targets": [[8, 3], [1, 1], [7, 8], [2, 5]],
}


def batches_of(data: str, step: int) -> list[dict[str, Tensor]]:
    """The micro-batches of one step: of all ranks, one rank's after another's."""
    generator = torch.Generator().manual_seed(17 + step)
    found = []
    for lengths in LENGTHS[data]:
        ids = torch.randint(layouts.VOCABULARY, (2, 8), generator=generator)
        targets = torch.arange(8) < torch.tensor(lengths)[:, None]
        found.append({"input_ids": ids, "labels": ids.masked_fill(~targets, -100)})
    return found


def weights_of(job: Job, batches: list[dict[str, Tensor]]) -> list[float]:
    if job.loss == "mean":
        return [1.0] * len(batches)
    return [float((batch["labels"][:, 1:] != -100).sum()) for batch in batches]


# --------------------------------------------------------------------------- between two steps


def evaluate(laid: Laid, optimizer: AdamW, step: int) -> AdamW:
    laid.model.eval()
    with torch.no_grad():
        laid.model(**batches_of("even", 100 + step)[0])
    laid.model.train()
    return optimizer


def save_and_load(laid: Laid, optimizer: AdamW, step: int) -> AdamW:
    """Whole and in shards, as checkpoints are written and read."""
    whole = full_state(laid.model)
    set_model_state_dict(laid.model, whole, options=StateDictOptions(full_state_dict=True))
    laid.model.load_state_dict(laid.model.state_dict())
    return optimizer


def assign(laid: Laid, optimizer: AdamW, step: int) -> AdamW:
    """Other tensors in place of the parameters; an optimizer of the old ones would be of no use."""
    state = {name: value.clone() for name, value in laid.model.state_dict().items()}
    laid.model.load_state_dict(state, assign=True)
    return AdamW(laid.model.parameters(), lr=LEARNING_RATE)


def unfreeze(laid: Laid, optimizer: AdamW, step: int) -> AdamW:
    if step:
        laid.model.requires_grad_(True)
    return optimizer


def freeze(laid: Laid, optimizer: AdamW, step: int) -> AdamW:
    """What a model "frozen" is from the second step on; AdamW passes by what has no gradient."""
    if step:
        layouts.freeze(laid.model)
    return optimizer


BETWEEN: dict[str, Callable[[Laid, AdamW, int], AdamW]] = {
    "nothing": lambda laid, optimizer, step: optimizer,
    "evaluate": evaluate,
    "save and load": save_and_load,
    "assign": assign,
    "unfreeze": unfreeze,
    "freeze": freeze,
}


# ------------------------------------------------------------------------------- done wrong


def _of_the_shards(self: GradientLeaves) -> list[Any]:
    leaves = _trainable(self)
    return [leaf._replace(tensors=leaf.parameters) for leaf in leaves]


def _rounded(self: GradientProbe, leaf: Any, gradient: Tensor) -> Tensor:
    _see(self, leaf, gradient)
    return gradient * (1 + 2**-23)


_trainable, _see = GradientLeaves.trainable, GradientProbe._see
_part = probe_module.on_this_process
FAULTS: dict[str | None, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    None: contextlib.nullcontext,
    "one process twice": contextlib.nullcontext,
    "copies left out": contextlib.nullcontext,
    "shards left out": lambda: mock.patch.object(
        probe_module, "on_this_process", lambda gradient: (_part(gradient)[0], 1)
    ),
    "hooks on shards": lambda: mock.patch.object(GradientLeaves, "trainable", _of_the_shards),
    "hooks that round": lambda: mock.patch.object(GradientProbe, "_see", _rounded),
}


# ------------------------------------------------------------------------------ one process

LEARNING_RATE = 3e-3
ETA = 0.5


class Decisions:
    """The library's second stage, fed with one step's moments after another's."""

    def __init__(self) -> None:
        self.estimator, self.criterion = NoiseScaleEstimator(), NormTest(ETA)
        self.controller = NormTestController(
            initial_global_batch_size=SAMPLES, max_global_batch_size=16 * SAMPLES
        )
        self.size, self.seen = SAMPLES, 0

    def after(self, moments: GradientMoments) -> tuple[int, str, float | None]:
        self.seen += self.size
        test = self.criterion.evaluate(moments, self.estimator.update(moments))
        decision = self.controller.decide(
            Observation(samples_seen=self.seen, global_batch_size=self.size, test=test)
        )
        self.size = decision.global_batch_size
        return decision.global_batch_size, decision.reason.value, test.statistic


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """Whole weights under the names of the unwrapped model: a collective."""
    found = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return {name.replace("_orig_mod.", ""): value.clone() for name, value in found.items()}


def digest(tensors: Iterator[Tensor | None]) -> str:
    """Equal for bitwise equal parts of this process."""
    found = hashlib.sha256()
    for tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        found.update(b"none" if local is None else local.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def hooked() -> int:
    """Hooks on tensors of this process, whoever holds them."""
    with warnings.catch_warnings():  # other modules' deprecated objects, when asked for their type
        warnings.simplefilter("ignore")
        gc.collect()
        return sum(
            len(hooks or ())
            for found in gc.get_objects()
            if issubclass(type(found), Tensor)
            for hooks in (found._backward_hooks, found._post_accumulate_grad_hooks)
        )


@dataclass
class Seen:
    """What one process saw in one run of a job."""

    moments: list[GradientMoments] = field(default_factory=list)
    decisions: list[tuple[int, str, float | None]] = field(default_factory=list)
    weights: list[dict[str, Tensor]] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    hooks: list[int] = field(default_factory=list)
    graphs: int = 0


def train(job: Job, folder: Path, *, probed: bool) -> Seen:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    laid = getattr(layouts, job.layout)(job.model, folder=folder, **job.options)
    model, ranks = laid.model, laid.ranks
    is_first = ranks.processes == 1 or dist.get_rank() == 0
    optimizer = AdamW(model.parameters(), lr=LEARNING_RATE)
    probe = GradientProbe(
        model,
        processes=ranks.processes,
        copies=1 if job.fault == "copies left out" else ranks.copies,
    )
    seen, decisions = Seen(), Decisions()
    for step in range(job.steps):
        measured = probed and step % job.interval == 0
        if measured:
            state = full_state(model)
            seen.weights += [state] if is_first else []
        optimizer = BETWEEN[job.between](laid, optimizer, step)
        if measured:
            seen.hooks.append(hooked())
        with probe if measured else contextlib.nullcontext():
            if measured:
                seen.hooks.append(hooked())
            sums = run_step(job, laid, step, probe if measured else None)
        if measured:
            seen.hooks.append(hooked())
            twice = job.fault == "one process twice" and is_first
            total = ranks.total(*(number * (1 + twice) for number in sums))
            moments = GradientMoments.of_sums(
                MomentSums(*total), global_batch_size=SAMPLES, data_parallel_size=ranks.size
            )
            assert moments is not None
            seen.moments.append(moments)
            if moments.is_finite:
                seen.decisions.append(decisions.after(moments))
        seen.digests.append(digest(parameter.grad for parameter in model.parameters()))
        if job.loss_scale != 1.0:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.div_(job.loss_scale)
        optimizer.step()
        optimizer.zero_grad()
        seen.digests.append(digest(iter(model.parameters())))
    seen.graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return seen


def run_step(job: Job, laid: Laid, step: int, probe: GradientProbe | None) -> tuple[float, ...]:
    """The micro-batches of this process's share, as the Trainer runs them."""
    ranks, batches = laid.ranks, batches_of(job.data, step)
    weights = weights_of(job, batches)
    share = ranks.share(MICRO_BATCHES)
    for index in share:
        last = index == share[-1]
        with layouts.POLICIES[job.policy](laid.model, last), layouts.precision(job.precision):
            if job.loss == "mean":
                loss = laid.model(**batches[index]).loss / len(share)
            else:
                items = torch.tensor(sum(weights))
                loss = laid.model(**batches[index], num_items_in_batch=items).loss * ranks.size
        with layouts.POLICIES[job.policy](laid.model, last):
            (loss * job.loss_scale).backward()
        if probe is not None:
            probe.end_micro_batch()
    if probe is None:
        return ()
    return probe.sums([weights[i] for i in share], loss_scale=job.loss_scale)


def perform(job: Job, folder: Path) -> dict[str, Any]:
    """One job on this process: with the probe, and without."""
    with FAULTS[job.fault]():
        probed = train(job, folder, probed=True)
    bare = train(job, folder, probed=False)
    return {
        **vars(probed),
        "bitwise": probed.digests == bare.digests,
        "bare graphs": bare.graphs,
        "moments": [asdict(moments) for moments in probed.moments],
    }


def work(rank: int, size: int, port: int, folder: Path, jobs: list[Job]) -> None:
    """All jobs on one process; what is refused is a result, as all are to refuse it alike."""
    torch.set_num_threads(1)
    if size > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in names.items()})
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        dist.init_process_group("gloo", rank=rank, world_size=size)
    results: dict[str, Any] = {}
    for job in jobs:
        begin = time.monotonic()
        try:
            results[job.name] = perform(job, folder)
        except (ValueError, RuntimeError) as error:
            results[job.name] = {"error": repr(error), "trace": traceback.format_exc()}
        results[job.name]["seconds"] = time.monotonic() - begin
    torch.save(results, folder / f"rank{rank}-of-{size}.pt")
    if size > 1:
        dist.barrier()
        time.sleep(0.5)  # for the others to have heard it
    os._exit(0)  # gloo may hang or abort in its destructors


# ----------------------------------------------------------------------------- all processes


def launch(processes: int, jobs: list[Job], folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Run jobs on so many processes, never in this one: torch.compile leaves threads behind.

    Returns the results by job, one per process. Raises `RuntimeError` if one ends otherwise than
    well, or none does in time.
    """
    _in_processes(processes, jobs, folder)
    files = [folder / f"rank{rank}-of-{processes}.pt" for rank in range(processes)]
    by_rank = [torch.load(file, weights_only=False) for file in files]
    return {job.name: [found[job.name] for found in by_rank] for job in jobs}


def _in_processes(size: int, jobs: list[Job], folder: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(target=work, args=(rank, size, port, folder, jobs)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + PATIENCE
    try:
        while True:
            codes = [process.exitcode for process in processes]
            if any(codes) or (time.monotonic() > end and None in codes):
                raise RuntimeError(f"exit codes of the processes: {codes}")
            if None not in codes:
                return
            time.sleep(0.02)
    finally:
        for process in processes:
            process.kill()
            process.join()
