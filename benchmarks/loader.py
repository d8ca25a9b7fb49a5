"""What the loader of steps costs: its throughput against a plain DataLoader, and a batch change.

    python benchmarks/loader.py               # about five minutes on two cores
    python benchmarks/loader.py --quick       # a minute, too short to decide anything
    python benchmarks/loader.py --clock cpu   # on a busy machine: processor time, workers' included

Throughput: whole epochs, back to back, of samples of 512 tokens in micro-batches of 8. A round runs
every arm twice, there and back (A B C C B A), and gives the ratio of the two sums; what is reported
is the median over the rounds. A ratio is `plain`'s time over the arm's: 1 is as fast, above is
faster. Arms, of the same dataset, order, collator and workers:

    plain   a torch DataLoader
    null    the same again: how far from 1 a ratio lands by chance
    steps   StepLoader with a plan that stays, as the Trainer uses it: it also counts tokens

Data: `blocks`, a datasets.Dataset of packed blocks, shuffled; `stream`, the same as an
IterableDataset of 4 shards; `text`, a stream of 4 shards that is tokenized while it is read. The
workers of a plain DataLoader read the shards of a stream at the same time, in an order that depends
on their number. StepLoader reads a stream in one process, so that the order does not.

Batch change, with two workers: steps of two micro-batches of 8, then of twice as many samples. The
cost is the time of the first step after the change, and of the first four, less what as many
samples took in the twelve steps before. Back to back, and with 1 ms of sleep for each sample, in
which workers fetch ahead as in training. Arms:

    none        no change: what chance does
    set_plan    StepLoader.set_plan
    restart     a new DataLoader over the indices that are left, with new workers
"""

import argparse
import json
import platform
import re
import resource
import sysconfig
import time
from array import array
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import DataLoader
from transformers import default_data_collator

import hf_adaptive_batch as hab
from hf_adaptive_batch.apply.clock import TrainingClock
from hf_adaptive_batch.apply.loader import StepLoader
from hf_adaptive_batch.apply.plan import BatchPlan
from hf_adaptive_batch.apply.sampler import EpochOrder
from hf_adaptive_batch.apply.sources import MapSource, StreamSource
from hf_adaptive_batch.apply.stream import StreamReader
from hf_adaptive_batch.byte_tokenizer import byte_tokenizer
from hf_adaptive_batch.hf_streams import private, settle
from hf_adaptive_batch.pretrain import collate_blocks
from hf_adaptive_batch.ranks import Ranks
from hf_adaptive_batch.tokens import count_tokens


TARGET = 0.95
TOKENS, MICRO_BATCH, SHARDS = 512, 8, 4
BEFORE, STEADY, AFTER = 6, 12, 4  # steps until the queue is full, that are the measure, and after
COUNT = partial(count_tokens, model=torch.nn.Module())


def processor_time() -> float:
    """Of this process, and of its workers that have ended."""
    uses = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(use.ru_utime + use.ru_stime for use in uses)


CLOCKS = {"wall": time.perf_counter, "cpu": processor_time}


class Data(NamedTuple):
    dataset: Any
    collate: Callable[[list[Any]], Any]
    samples: int


def blocks(samples: int) -> Data:
    """Packed blocks, as `hf_adaptive_batch.packing` makes them."""
    tokens = np.random.default_rng(0).integers(0, 50_000, (samples, TOKENS), dtype=np.int32)
    features = datasets.Features(
        {"input_ids": datasets.List(datasets.Value("int32"), length=TOKENS)}
    )
    data = datasets.Dataset.from_dict({"input_ids": tokens}, features=features)
    return Data(data, collate_blocks, samples)


def stream(samples: int) -> Data:
    """The same, without indices."""
    return blocks(samples)._replace(
        dataset=blocks(samples).dataset.to_iterable_dataset(num_shards=SHARDS)
    )


def text(samples: int) -> Data:
    """Pieces of Python's standard library, tokenized when they are read."""
    library, pieces = Path(sysconfig.get_path("stdlib")), []
    for file in sorted(library.glob("*.py")):
        source = file.read_text(encoding="utf-8", errors="replace")
        pieces += [source[i : i + TOKENS] for i in range(0, len(source), TOKENS)]
    found = datasets.Dataset.from_dict({"text": (pieces * (1 + samples // len(pieces)))[:samples]})
    options = {"truncation": True, "max_length": TOKENS, "padding": "max_length"}
    tokenizer = partial(byte_tokenizer(), return_token_type_ids=False, **options)
    tokenized = found.to_iterable_dataset(num_shards=SHARDS).map(
        tokenizer, input_columns="text", remove_columns="text"
    )
    return Data(tokenized, default_data_collator, samples)


DATA = {"blocks": blocks, "stream": stream, "text": text}


def step_loader(
    data: Data, sampler: Any, plan: BatchPlan, options: dict[str, Any]
) -> tuple[StepLoader, TrainingClock]:
    """As `build_run` builds it."""
    clock = TrainingClock(
        epoch_samples=data.samples if sampler is not None else None,
        initial_global_batch_size=plan.global_batch_size,
        initial_round_size=plan.micro_batch_size,
        budget_samples=1 << 40,
    )
    if sampler is None:
        source: Any = StreamSource(
            StreamReader(data.dataset, Ranks(), private=private, settle=settle), clock, Ranks()
        )
    else:
        source = MapSource(data.dataset, EpochOrder(sampler), clock, Ranks())
    loader = StepLoader(source, plan, clock, lambda step: False, options, count_tokens=COUNT)
    return loader, clock


# ------------------------------------------------------------------------------ throughput


class Case(NamedTuple):
    data: str
    workers: int
    persistent: bool
    accumulation: int

    @property
    def name(self) -> str:
        workers = f"{self.workers}{' persistent' if self.persistent else ''}"
        return f"{self.data:<6} | {workers:<12} | {self.accumulation:>12}"


CASES = [
    *(
        Case("blocks", workers, persistent, accumulation)
        for workers, persistent in ((0, False), (2, False), (2, True))
        for accumulation in (1, 4)
    ),
    *(Case(data, workers, False, 4) for data in ("stream", "text") for workers in (0, 1, 2)),
]


class Epochs:
    """All arms of a case: functions that run one epoch and return its samples."""

    def __init__(self, case: Case, data: Data) -> None:
        self._data, self._case = data, case
        options = {"num_workers": case.workers, "persistent_workers": case.persistent}
        options["collate_fn"] = data.collate
        self.arms = {
            arm: partial(self._plain, self._plain_loader(options)) for arm in ("plain", "null")
        }
        plan = BatchPlan(micro_batch_size=MICRO_BATCH, accumulation_steps=case.accumulation)
        loader, clock = step_loader(data, self._sampler(), plan, options)
        self.arms["steps"] = partial(self._steps, loader, clock)

    def _sampler(self) -> SeedableRandomSampler | None:
        if self._case.data != "blocks":
            return None
        generator = torch.Generator()
        return SeedableRandomSampler(self._data.dataset, generator=generator, data_seed=0)

    def _plain_loader(self, options: dict[str, Any]) -> DataLoader[Any]:
        sampler = self._sampler()
        return DataLoader(self._data.dataset, MICRO_BATCH, sampler=sampler, **options)

    @staticmethod
    def _plain(loader: DataLoader[Any]) -> int:
        return sum(len(batch["input_ids"]) for batch in loader)

    @staticmethod
    def _steps(loader: StepLoader, clock: TrainingClock) -> int:
        samples = 0
        for step in loader:
            clock.advance(
                samples=step.global_samples, tokens=step.tokens, ends_stream=step.ends_stream
            )
            samples += sum(len(batch["input_ids"]) for batch in step.micro_batches)
        return samples


def throughput(case: Case, data: Data, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """All arms of one case."""
    arms = Epochs(case, data).arms
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(1 + rounds):  # the first warms up
        spent = dict.fromkeys(arms, 0.0)
        for arm in (*arms, *reversed(arms)):
            start = clock()
            samples = arms[arm]()
            spent[arm] += clock() - start
            assert samples == data.samples, (case, arm, samples)
        for arm, total in spent.items():
            seconds[arm].append(total)
    found = {arm: np.array(each[1:]) for arm, each in seconds.items()}
    ratios = {arm: found["plain"] / found[arm] for arm in ("null", "steps")}
    return {
        **case._asdict(),
        "rounds": rounds,
        "samples": data.samples,
        "plain_samples_per_s": round(float(2 * data.samples / np.median(found["plain"]))),
        "arms": {arm: summary(each, 4) for arm, each in ratios.items()},
        "ratios": {arm: each.round(4).tolist() for arm, each in ratios.items()},
    }


# ---------------------------------------------------------------------------- batch change


class Stepping:
    """Optimizer steps of a StepLoader."""

    def __init__(self, data: Data, order: array, plan: BatchPlan, options: dict[str, Any]) -> None:
        self._loader, self._clock = step_loader(data, order, plan, options)
        self._steps = iter(self._loader)

    def step(self) -> list[int]:
        """Fetch one, and say of which micro-batches it consists."""
        step = next(self._steps)
        self._clock.advance(samples=step.global_samples, tokens=step.tokens)
        return step.sizes

    def change(self, plan: BatchPlan) -> None:
        self._loader.set_plan(plan)

    def close(self) -> None:
        self._loader.close()


class Restarting:
    """Optimizer steps of a DataLoader that is made anew where the batch changes."""

    def __init__(self, data: Data, order: array, plan: BatchPlan, options: dict[str, Any]) -> None:
        self._data, self._order, self._options = data, order, options
        self._position = 0
        self._batches: Iterator[Any] = iter(())
        self.change(plan)

    def step(self) -> list[int]:
        batches = [next(self._batches) for _ in range(self._plan.accumulation_steps)]
        sizes = [len(batch["input_ids"]) for batch in batches]
        self._position += sum(sizes)
        return sizes

    def change(self, plan: BatchPlan) -> None:
        self._plan, self._batches = plan, iter(())  # the old workers go with their iterator
        left = self._order[self._position :]
        self._batches = iter(
            DataLoader(self._data.dataset, plan.micro_batch_size, sampler=left, **self._options)
        )

    def close(self) -> None:
        self._batches = iter(())


class Change(NamedTuple):
    name: str
    grown: BatchPlan
    sleep_ms: float  # of each sample


FIRST = BatchPlan(micro_batch_size=MICRO_BATCH, accumulation_steps=2)
WIDER = BatchPlan(micro_batch_size=2 * MICRO_BATCH, accumulation_steps=2)
LONGER = BatchPlan(micro_batch_size=MICRO_BATCH, accumulation_steps=4)
CHANGES = [
    Change(f"2 x 8 -> {grown.accumulation_steps} x {grown.micro_batch_size}", grown, sleep_ms)
    for grown in (WIDER, LONGER)
    for sleep_ms in (1.0, 0.0)
]


def one_change(case: Change, kind: type, grown: BatchPlan, data: Data) -> tuple[float, float, int]:
    """A run through one change.

    Returns:
        Extra seconds of the first step, of the first `AFTER` steps; micro-batches of the old size.
    """
    order = array("q", torch.randperm(data.samples).tolist())
    options = {"num_workers": 2, "collate_fn": data.collate}
    feed = kind(data, order, FIRST, options)

    def step() -> list[int]:
        sizes = feed.step()
        if case.sleep_ms:
            time.sleep(sum(sizes) * case.sleep_ms / 1000)
        return sizes

    for _ in range(BEFORE):
        step()
    start = time.perf_counter()
    samples = sum(sum(step()) for _ in range(STEADY))
    per_sample = (time.perf_counter() - start) / samples
    start = time.perf_counter()
    if grown is not FIRST:
        feed.change(grown)
    extra, taken, old = [], 0, 0
    for _ in range(AFTER):
        sizes = step()
        taken += sum(sizes)
        old += sum(size < grown.micro_batch_size for size in sizes)
        extra.append(time.perf_counter() - start - taken * per_sample)
    feed.close()
    return extra[0], extra[-1], old


def batch_change(case: Change, data: Data, rounds: int) -> dict[str, Any]:
    """All arms of one change."""
    arms = {
        "none": partial(one_change, case, Stepping, FIRST, data),
        "set_plan": partial(one_change, case, Stepping, case.grown, data),
        "restart": partial(one_change, case, Restarting, case.grown, data),
    }
    found: dict[str, list[tuple[float, float, int]]] = {arm: [] for arm in arms}
    for number in range(1 + rounds):
        for arm in (*arms, *reversed(arms)):
            one = arms[arm]()
            if number:  # the first round warms up
                found[arm].append(one)
    columns = {arm: np.array(each).T for arm, each in found.items()}
    return {
        "change": case.name,
        "sleep_ms": case.sleep_ms,
        "runs": 2 * rounds,
        "old_micro_batches": int(np.median(columns["set_plan"][2])),
        "arms": {
            arm: {
                "first_step_ms": summary(1000 * first, 2),
                f"{AFTER}_steps_ms": summary(1000 * all_of_them, 2),
            }
            for arm, (first, all_of_them, _) in columns.items()
        },
    }


# ---------------------------------------------------------------------------------- report


def summary(values: np.ndarray, digits: int) -> dict[str, float]:
    """Median, quartiles, and the 95 % percentile bootstrap interval of the median."""
    resamples = np.random.default_rng(0).choice(values, (10_000, len(values)))
    low, high = np.quantile(np.median(resamples, axis=1), [0.025, 0.975])
    first, middle, third = np.quantile(values, [0.25, 0.5, 0.75])
    found = {"median": middle, "low": low, "high": high, "quartile_1": first, "quartile_3": third}
    return {name: round(float(value), digits) for name, value in found.items()}


def print_throughput(results: list[dict[str, Any]]) -> None:
    print("| data   | workers      | accumulation | plain, samples/s | null  | steps | interval |")
    print("|--------|--------------|-------------:|-----------------:|------:|------:|----------|")
    for result in results:
        null, s = result["arms"]["null"], result["arms"]["steps"]
        print(
            f"| {Case(*(result[field] for field in Case._fields)).name} "
            f"| {result['plain_samples_per_s']:>16,} | {null['median']:.3f} | {s['median']:.3f} "
            f"| {s['low']:.3f} .. {s['high']:.3f} |"
        )
    for result in results:
        if result["data"] == "blocks":
            s = result["arms"]["steps"]
            met = "met" if s["low"] >= TARGET else "missed" if s["high"] < TARGET else "undecided"
            name = " ".join(Case(*(result[field] for field in Case._fields)).name.split())
            print(f"{name}: at least {TARGET}: {met} ({s['median']:.3f})")


def print_changes(results: list[dict[str, Any]]) -> None:
    print(
        "| change          | sleep | arm      | first step, ms         | first 4 steps, ms      |"
    )
    print(
        "|-----------------|------:|----------|------------------------|------------------------|"
    )
    for result in results:
        for arm, columns in result["arms"].items():
            cells = [
                f"{s['median']:>6.1f} ({s['low']:.1f} .. {s['high']:.1f})" for s in columns.values()
            ]
            print(
                f"| {result['change']:<15} | {result['sleep_ms']:>5} | {arm:<8} "
                f"| {cells[0]:<22} | {cells[1]:<22} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8, help="of a throughput case (8)")
    parser.add_argument(
        "--changes", type=int, default=6, help="rounds of a batch change (6); 0: none"
    )
    parser.add_argument("--samples", type=int, default=1024, help="of an epoch (1024)")
    parser.add_argument("--quick", action="store_true", help="few rounds, and fewer cases")
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA), help="only these")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="of throughput: wall (default), or cpu: the work, not how long it takes",
    )
    parser.add_argument("--output", type=Path, help="write the result here, as JSON")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.changes, options.samples = 2, 1, 512
    torch.set_num_threads(1)
    cases = [case for case in CASES if case.data in options.data]
    changes = CHANGES
    if options.quick:
        cases = [case for case in cases if case.accumulation > 1]
        changes = [change for change in changes if change.sleep_ms]
    if options.clock == "cpu":  # is told of workers when they end
        cases = [case for case in cases if not case.persistent]
    data = {name: DATA[name](options.samples) for name in (*options.data, "blocks")}
    speeds = []
    for case in cases:
        print(f"measuring {' '.join(case.name.split())} ...", flush=True)
        rounds = options.rounds * (1 if case.workers else 3)  # these are short
        speeds.append(throughput(case, data[case.data], rounds, CLOCKS[options.clock]))
    costs: list[dict[str, Any]] = []
    for change in changes if options.changes else ():
        print(f"measuring {change.name}, {change.sleep_ms} ms of sleep ...", flush=True)
        costs.append(batch_change(change, data["blocks"], options.changes))
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", cpuinfo.read_text() if cpuinfo.exists() else "")
    record = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "datasets": datasets.__version__,
        "hf_adaptive_batch": hab.__version__,
        "processor": model[1] if model else platform.machine(),
        "clock": options.clock,
        "throughput": speeds,
        "changes": costs,
    }
    print(f"\nOver a plain DataLoader; {record['processor']}\n")
    print_throughput(speeds)
    if costs:
        print("\nExtra time of a batch change, in ms\n")
        print_changes(costs)
        for cost in costs:
            print(
                f"{cost['change']}, {cost['sleep_ms']} ms of sleep: the new batch at once, with "
                f"{cost['old_micro_batches']} micro-batches of the old size in {AFTER} steps"
            )
    if options.output:
        text = json.dumps(record, indent=1)
        text = re.sub(r"\[[\d\s.,]+\]", lambda numbers: re.sub(r"\s+", " ", numbers[0]), text)
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
