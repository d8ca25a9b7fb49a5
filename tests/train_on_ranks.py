"""Runs jobs on several real processes with gloo, and brings back what every rank saw.

    python -m torch.distributed.run --nproc_per_node 2 tests/train_on_ranks.py FOLDER [JOB ...]

In the tests the processes are forked from one that has imported everything and run nothing, so that
torch is imported once for all of them.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import random
import socket
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import datasets
import torch
import torch.distributed as dist
from datasets.distributed import split_dataset_by_node
from torch.utils.data import IterableDataset, Sampler
from transformers import TrainerCallback

from hf_adaptive_batch import AdaptiveBatchTrainer, read_records
from hf_adaptive_batch.decide.controllers import BatchDecision, Observation, Reason
from hf_adaptive_batch.report.records import RECORDS_FILE
from hf_adaptive_batch.run import AdaptiveRun
from tests.cases import MeanLossModel, arguments, llama, pad, sequences
from tests.reference import flat_gradient


PATIENCE = 180.0  # seconds for all jobs of one launch
MARK = 31  # the token of the one sample whose loss is NaN
# Forced by so small a tolerance: the batch doubles 16 -> 32 as soon as there is an estimate.
FORCED = {"eta": 0.02, "batch_warmup_samples": 0, "max_global_batch_size": 32}


@dataclass(frozen=True)
class Job:
    """One training run, the same on all ranks; all of it can be pickled.

    Attributes:
        name: Its folder.
        data: A key of `DATA`.
        model: A key of `MODELS`.
        options: Arguments; the accumulation is set so that a first step has 16 samples.
        resume: Folder of the checkpoint to resume.
        stop: Step to stop at, after it was saved.
        own_sampler: Whether the trainer has a sampler that is seeded otherwise on every rank.
        watch: Whether to keep every step's gradient, weights and samples.
        contrary: Whether a controller decides that says something else on every rank.
        agree: Whether the first rank's decisions hold for all.
        evaluated: Whether the model is evaluated before it is trained.
        unfrozen: Whether a layer is trained only from the third step on.
    """

    name: str
    data: str = "rows"
    model: str = "llama"
    options: dict[str, Any] = field(default_factory=dict)
    resume: str | None = None
    stop: int | None = None
    own_sampler: bool = False
    watch: bool = True
    contrary: bool = False
    agree: bool = True
    evaluated: bool = False
    unfrozen: bool = False


# ----------------------------------------------------------------------------- data and models


class Unseeded(IterableDataset):
    """Shuffles by a generator that nobody has seeded."""

    def __iter__(self):
        rows = list(sequences(61))
        random.Random().shuffle(rows)
        return iter(rows)


def marked() -> datasets.Dataset:
    """Rows of which only number 21 holds the mark."""
    rows = [[token % MARK for token in row] for row in sequences(61)["input_ids"]]
    rows[21][3] = MARK
    return datasets.Dataset.from_dict({"input_ids": rows, "labels": rows})


def uneven_shards(lengths: list[int]) -> Any:
    def rows(shards):
        for begin, end in shards:
            yield from sequences(sum(lengths)).select(range(begin, end))

    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    shards = list(zip([0, *ends[:-1]], ends, strict=True))
    stream = datasets.IterableDataset.from_generator(rows, gen_kwargs={"shards": shards})
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    return split_dataset_by_node(stream, rank=rank, world_size=size)


DATA = {
    "rows": lambda: sequences(61, uneven=True),
    "even": lambda: sequences(61),
    "17": lambda: sequences(17, uneven=True),
    "19": lambda: sequences(19, uneven=True),
    "marked": marked,
    "stream": lambda: sequences(61, uneven=True).to_iterable_dataset(num_shards=3),
    "unseeded": Unseeded,
    "three_shards": lambda: uneven_shards([30, 8, 23]),
    "four_shards": lambda: uneven_shards([30, 3, 20, 8]),
    "by_hand": lambda: sequences(60 + int(os.environ.get("RANK", 0))),
}


class Poisoned(MeanLossModel):
    """Its loss is NaN for the mark."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        found = super().forward(input_ids, labels)
        if (input_ids == MARK).any():
            found["loss"] = found["loss"] * torch.nan
        return found


def without_dropout(model: Any) -> Any:
    model.dropout.p = 0.0
    return model


MODELS = {
    "llama": lambda: llama(dropout=0.0),
    "mean": lambda: without_dropout(MeanLossModel()),
    "poisoned": lambda: without_dropout(Poisoned()),
}


# ------------------------------------------------------------------------------------- one rank


class Contrary:
    """Grows after some samples; how far, when, and what is measured, depends on the rank."""

    max_global_batch_size = 64
    can_change = True

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def measures(self, step: int) -> bool:
        return (step + self.rank) % 2 == 0

    def decide(self, seen: Observation) -> BatchDecision:
        grown = 32 + 16 * self.rank
        if seen.samples_seen < 40:
            return BatchDecision(global_batch_size=16, reason=Reason.WARMING_UP)
        return BatchDecision(global_batch_size=grown, reason=Reason.TEST_FAILED)


class Permutation(Sampler):
    """A sampler that accelerate does not know, and so does not replace."""

    def __init__(self, samples: int, seed: int) -> None:
        self.samples, self.generator = samples, torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return self.samples

    def __iter__(self):
        return iter(torch.randperm(self.samples, generator=self.generator).tolist())


class OwnSampler(AdaptiveBatchTrainer):
    def _get_train_sampler(self, *args: Any) -> Permutation:
        return Permutation(len(self.train_dataset), seed=self.args.process_index)


class Watcher(TrainerCallback):
    """Keeps what a step looks like on this rank, and stops where it is told to."""

    def __init__(self, job: Job) -> None:
        self.job, self.steps = job, []
        self.trainer: Any = None

    def on_step_begin(self, args, state, control, **kwargs):
        if self.job.unfrozen:
            first = next(self.trainer.model.parameters())
            first.requires_grad_(state.global_step >= 2)
        if self.job.watch:
            weights = {n: v.clone() for n, v in self.trainer.model.state_dict().items()}
            step = self.trainer.run.step
            self.steps.append(
                {"weights": weights, "batches": step.micro_batches, "sizes": step.sizes}
            )

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.job.watch:
            self.steps[-1]["gradient"] = flat_gradient(self.trainer.model)

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.job.stop:
            control.should_training_stop = True


def perform(job: Job, folder: Path) -> dict[str, Any]:
    """One job on this rank."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    given = {
        "gradient_accumulation_steps": 4 // size,
        "average_tokens_across_devices": True,
        "max_grad_norm": 0.0,
        "num_train_epochs": 2,
        **FORCED,
        "ddp_find_unused_parameters": False,
        **({"ddp_backend": "gloo"} if size > 1 else {}),
        **job.options,
    }
    kind = OwnSampler if job.own_sampler else AdaptiveBatchTrainer
    watcher, out, calls = Watcher(job), folder / job.name, [0]
    if job.contrary:
        extra = {"controller": Contrary(int(os.environ.get("RANK", 0)))}
    else:
        extra = {}
    own = contextlib.nullcontext()
    if not job.agree:
        own = mock.patch.object(AdaptiveRun, "agreed", lambda run, decision: decision)
    with contextlib.redirect_stdout(io.StringIO()) as printed, own:
        trainer = kind(
            args=arguments(out, **given),
            model=MODELS[job.model](),
            train_dataset=DATA[job.data](),
            data_collator=pad if job.model == "llama" else None,
            callbacks=[watcher],
            **extra,
        )
        watcher.trainer = trainer

        def count(*_: Any) -> None:
            calls[0] += 1

        trainer.model.register_forward_pre_hook(count)
        if job.unfrozen:
            next(trainer.model.parameters()).requires_grad_(False)
        if job.evaluated:
            trainer.evaluate(sequences(16))
        trainer.train(resume_from_checkpoint=job.resume)
    return {
        "steps": watcher.steps,
        "calls": calls[0],
        "weights": {n: v.clone() for n, v in trainer.model.state_dict().items()},
        "skipped": trainer.run.skipped_steps,
        "writes": trainer.run.records is not None,
        "history": trainer.state.log_history,
        "printed": printed.getvalue(),
        "epoch_index": trainer.run.clock.epoch_index,
        "records": read_records(out) if (out / RECORDS_FILE).exists() else None,
    }


def work(rank: int, size: int, port: int, folder: Path, jobs: list[Job]) -> None:
    """All jobs on one rank; an error is a result, as all ranks are to raise it alike."""
    torch.set_num_threads(1)
    if size > 1:
        multiprocessing.set_start_method("fork", force=True)  # of loader workers, as everywhere
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in names.items()})
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    results: dict[str, Any] = {}
    for job in jobs:
        begin = time.monotonic()
        try:
            results[job.name] = perform(job, folder)
        except (ValueError, RuntimeError) as error:
            results[job.name] = {"error": str(error), "trace": traceback.format_exc()}
        results[job.name]["seconds"] = time.monotonic() - begin
    torch.save(results, folder / f"rank{rank}-of-{size}.pt")
    if dist.is_initialized():
        dist.barrier()
        time.sleep(0.5)  # for the others to have heard it
        os._exit(0)  # gloo may hang or abort in its destructors, plain Trainer or not


# ----------------------------------------------------------------------------------- all ranks


def launch(ranks: int, jobs: list[Job], folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Run jobs on so many processes, or in this one.

    Returns the results by job, one per rank. Raises `RuntimeError` if a process ends otherwise than
    well, or none does in time.
    """
    if ranks == 1:
        work(0, 1, 0, folder, jobs)
    else:
        _in_processes(ranks, jobs, folder)
    return results(ranks, folder)


def results(ranks: int, folder: Path) -> dict[str, list[dict[str, Any]]]:
    files = [folder / f"rank{rank}-of-{ranks}.pt" for rank in range(ranks)]
    by_rank = [torch.load(file, weights_only=False) for file in files]
    return {name: [found[name] for found in by_rank] for name in by_rank[0]}


def _in_processes(ranks: int, jobs: list[Job], folder: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(target=work, args=(rank, ranks, port, folder, jobs))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + PATIENCE
    try:
        while any(process.is_alive() for process in processes):
            codes = [process.exitcode for process in processes]
            if any(codes) or time.monotonic() > end:
                raise RuntimeError(f"exit codes of the ranks: {codes}")
            time.sleep(0.02)
        codes = [process.exitcode for process in processes]
        if any(codes):
            raise RuntimeError(f"exit codes of the ranks: {codes}")
    finally:
        for process in processes:
            process.kill()
            process.join()


if __name__ == "__main__":
    wanted = sys.argv[2:] or ["rows"]
    work(
        int(os.environ["RANK"]),
        int(os.environ["WORLD_SIZE"]),
        int(os.environ["MASTER_PORT"]),
        Path(sys.argv[1]),
        [Job(name, data=name) for name in wanted],
    )
