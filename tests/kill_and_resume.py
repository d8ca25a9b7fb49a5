"""Kills a real `pretrain` run again and again, resumes it, and compares it with one never killed.

    python tests/kill_and_resume.py --kills 200 [--seed 1] [--flavour stream] [-- --more flags]

Nothing of the package is replaced: each stretch of the run is the command `pretrain`, in a process
of its own that SIGKILL ends. To import torch only once, most of them are forked from a process that
has imported everything and run nothing; some are started as `python -m hf_adaptive_batch`.
"""

# ruff: noqa: T201 (a script's output is print)

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hf_adaptive_batch import read_records
from hf_adaptive_batch.checkpoint import STATE_FILE, last_complete_checkpoint
from hf_adaptive_batch.report.records import RECORDS_FILE


TRAINER_STATE = "trainer_state.json"  # what the Trainer writes last into a checkpoint
SAVE_STEPS = 2
KILLS_PER_RUN = 25
PATIENCE = 120.0  # seconds; a stretch takes one or two

# The batch grows 4 -> 8 -> 16 -> 32 -> 48 -> 64 in some 120 steps, and each is logged.
FLAGS = (
    *("--hidden_size", "32", "--num_hidden_layers", "2", "--num_attention_heads", "2"),
    *("--intermediate_size", "64", "--block_size", "32", "--max_eval_samples", "8"),
    *("--max_train_samples", "3000", "--max_global_batch_size", "64", "--logging_steps", "1"),
    *("--save_steps", str(SAVE_STEPS), "--use_cpu", "true", "--disable_tqdm", "true"),
)
# By the data and its workers, which fetch far enough ahead that a checkpoint after a growth has
# micro-batches of both sizes in it. Older checkpoints are deleted, so that this is killed, too.
FLAVOURS = {
    "worker": (
        *("--dataloader_num_workers", "1", "--dataloader_prefetch_factor", "6"),
        *("--save_total_limit", "2", "--eval_strategy", "no"),
    ),
    "no-worker": (
        *("--dataloader_num_workers", "0", "--save_total_limit", "1"),
        *("--eval_strategy", "steps", "--eval_steps", "7"),
    ),
    "stream": (
        *("--streaming", "true", "--shuffle_blocks", "16", "--dataloader_num_workers", "1"),
        *("--dataloader_prefetch_factor", "6", "--save_total_limit", "2", "--eval_strategy", "no"),
    ),
}
KEEP_ALL = ("--save_total_limit", "1000")

# When a kill comes, in the proportion in which they come: at any step; inside a save; right after
# one, when an older checkpoint is deleted; while the process starts and resumes. Beside these, once
# the step is saved in which the batch grew, and at the end, when training is done.
KINDS = ("save", "progress", "start-up", "save", "deletion")


class Difference(AssertionError):
    """What a killed and resumed run has other than the one that was not killed."""


# ------------------------------------------------------------------------ processes that are killed


class Process:
    """One stretch of a run, with its loader workers in a session of its own."""

    def __init__(self, pid: int, ended: Callable[[float], int | None]) -> None:
        self.pid = pid
        self._ended = ended
        self.status: int | None = None  # as Popen.returncode

    def poll(self, seconds: float = 0.0) -> int | None:
        if self.status is None:
            self.status = self._ended(seconds)
        return self.status

    def kill(self, *, everything: bool) -> int | None:
        """Kill the process, with or without its loader workers, and see how it ended."""
        if self.status is None:  # else its id may be another's by now
            if everything:
                os.killpg(self.pid, signal.SIGKILL)
            else:
                self._leave_its_workers()
        return self.poll(PATIENCE)

    def _leave_its_workers(self) -> None:
        # torch's take for parent what they find when they begin, and one that finds its parent
        # killed already never ends. So a parent that has just forked one waits for it to begin.
        os.kill(self.pid, signal.SIGSTOP)
        asleep, end = 0, time.monotonic() + PATIENCE
        while asleep < 3 and time.monotonic() < end:
            time.sleep(0.01)
            states = _states({self.pid})
            states.pop(self.pid, None)
            asleep = asleep + 1 if set(states.values()) <= {"S"} else 0
        os.kill(self.pid, signal.SIGKILL)


class Starter:
    """Starts the command in processes forked from one that has imported everything."""

    def __init__(self) -> None:
        self.sessions: set[int] = set()  # of all processes that were started
        self._current: Process | None = None
        self._connection, theirs = Pipe()
        fd = theirs.fileno()
        self._zygote = subprocess.Popen(
            [sys.executable, __file__, "--zygote", str(fd)], pass_fds=[fd], env=_environment()
        )
        theirs.close()

    def __enter__(self) -> Starter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._current is not None and self._current.poll() is None:
            self._current.kill(everything=True)
        self._connection.close()
        self._zygote.wait()

    def start(self, arguments: Sequence[str], log: Path, *, command_line: bool = False) -> Process:
        """Start `pretrain`, its output in a file; only when the last one has ended."""
        log.write_bytes(b"")  # of the last one, which is not to be taken for this one's
        if command_line:
            process = _start_command_line(arguments, log)
        else:
            self._connection.send((list(arguments), str(log)))
            process = Process(self._connection.recv(), self._ended)
        self._current = process
        self.sessions.add(process.pid)
        return process

    def _ended(self, seconds: float) -> int | None:
        return self._connection.recv() if self._connection.poll(seconds) else None

    def survivors(self, seconds: float = 20.0) -> list[str]:
        """Processes of killed runs that are still there after a while, and where each one waits.

        A loader worker looks every five seconds whether its parent lives. They are ended.
        """
        end = time.monotonic() + seconds
        while (alive := _states(self.sessions)) and time.monotonic() < end:
            time.sleep(0.1)
        return [_last_words(pid) for pid in alive]


def _environment() -> dict[str, str]:
    # Also where the package is not installed: pytest finds it by its own setting.
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(path for path in paths if path)
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONFAULTHANDLER": "1"}


def _start_command_line(arguments: Sequence[str], log: Path) -> Process:
    command = [sys.executable, "-u", "-m", "hf_adaptive_batch", *arguments]
    with log.open("wb") as output:
        popen = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env=_environment(),
        )

    def ended(seconds: float) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return popen.wait(seconds)
        return None

    return Process(popen.pid, ended)


def _zygote(connection: Connection) -> int:
    """Fork a process for every command that comes along the connection; one at a time."""
    import matplotlib.pyplot  # noqa: F401

    import hf_adaptive_batch.pretrain  # noqa: F401
    from hf_adaptive_batch.cli import main

    gc.collect()
    gc.freeze()  # the Trainer collects often, and would look through all that was imported
    pid = None
    while True:
        try:
            arguments, log = connection.recv()
        except EOFError:
            return 0
        if pid is not None:  # a zombie until now, so that no other process could get its id
            os.waitpid(pid, 0)
        pid = os.fork()
        if pid == 0:
            os.setsid()
            connection.send(os.getpid())
            connection.close()
            with open(log, "wb") as output, open(os.devnull, "rb") as nothing:  # noqa: PTH123
                os.dup2(nothing.fileno(), 0)
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
            return main(arguments)  # and out of the interpreter, as the command does
        info = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert info is not None
        exited = info.si_code == os.CLD_EXITED
        connection.send(info.si_status if exited else -info.si_status)


def _states(sessions: set[int]) -> dict[int, str]:
    """The living processes of some sessions, and the state that each is in."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            text = (entry / "stat").read_text()
            state, _, _, session = text.rpartition(")")[2].split()[:4]
            if int(session) in sessions and state not in "ZX":
                found[int(entry.name)] = state
    return found


def _last_words(pid: int) -> str:
    """A process, the stack it was found in, which SIGABRT makes Python print, and its end."""
    folder = Path("/proc", str(pid))
    try:
        state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
        output = (folder / "fd/2").resolve()  # its log, which later stretches have emptied
    except OSError as error:
        return f"{pid}: {error}"
    for end in (signal.SIGABRT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, end)
        time.sleep(0.5)
    written = output.read_bytes().lstrip(b"\0") if output.is_file() else b""
    stack = written[max(0, written.rfind(b"Fatal Python error")) :].decode("utf-8", "replace")
    stack = stack.partition("\nExtension modules")[0]
    return f"{pid} in state {state}, its parent {parent}\n{stack}"


# ------------------------------------------------------------------------------- what a run leaves


def checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoint folders by step, in order, complete or not."""
    return dict(sorted((_step(path), path) for path in folder.glob("checkpoint-*")))


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def damage(found: Path, expected: Path) -> str:
    """The first file in which a checkpoint differs from the uninterrupted run's; "" if none."""
    for path in sorted(expected.iterdir()):
        other = found / path.name
        if not other.exists():
            return f"{path.name} missing"
        if path.name == "training_args.bin":  # the output folder is in it
            if not zipfile.is_zipfile(other):
                return f"{path.name} torn"
        elif other.read_bytes() != path.read_bytes() and not _same_content(other, path):
            return f"{path.name} other"
    return ""


def _same_content(found: Path, expected: Path) -> bool:
    """Whether two files hold the same; a pickle of the same may have other bytes."""
    try:
        if expected.name == TRAINER_STATE:
            return _state(found) == _state(expected)
        if expected.name == STATE_FILE:
            return _own_state(found) == _own_state(expected)
        if expected.suffix in (".pt", ".pth"):
            return _equal(*(torch.load(path, weights_only=False) for path in (found, expected)))
    except Exception:  # whatever a torn file gives
        return False
    return False


def _state(path: Path) -> dict[str, Any]:
    """The Trainer's state, without what depends on the clock on the wall."""
    state: dict[str, Any] = json.loads(path.read_text("utf-8"))
    state["log_history"] = [
        {k: v for k, v in entry.items() if "runtime" not in k and "per_second" not in k}
        for entry in state["log_history"]
        if "train_loss" not in entry  # the Trainer counts it from the resume on
    ]
    return state


def _own_state(path: Path) -> dict[str, Any]:
    """Ours, without how `datasets` puts a place: after a resume in other words, for the same."""
    state: dict[str, Any] = json.loads(path.read_text("utf-8"))
    for place in state["loader"]["source"].get("places", ()):
        place["state"] = place["state"] and {**place["state"], "documents": None}
    return state


def _equal(first: Any, second: Any) -> bool:
    if type(first) is not type(second):
        return False
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_equal(first[k], second[k]) for k in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(_equal, first, second))
    if hasattr(first, "tobytes"):
        return first.tobytes() == second.tobytes()
    if hasattr(first, "numpy"):
        return _equal(first.numpy(), second.numpy())
    return bool(first == second)


def history(folder: Path) -> list[dict[str, Any]]:
    """All that was logged."""
    history: list[dict[str, Any]] = _state(folder / TRAINER_STATE)["log_history"]
    return history


class Whole:
    """The run that is never killed, with all its checkpoints."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records, self.history = read_records(folder), history(folder)

    @property
    def sizes(self) -> list[int]:
        """The batch size of every step."""
        return self.records["global_batch_size"]

    @property
    def changes(self) -> list[int]:
        """The steps that changed the batch size of the next."""
        pairs = zip(self.sizes, self.sizes[1:], strict=False)
        return [step for step, (now, following) in enumerate(pairs, 1) if now != following]

    @property
    def steps(self) -> int:
        return len(self.sizes)


class Progress:
    """What a stretch of the run has written so far, seen from outside."""

    def __init__(self, folder: Path) -> None:
        self._records = folder / RECORDS_FILE
        self._folder = folder
        self._inode = self._state(self._records)[0]
        self._before = {
            path: self._state(path) for folder in self._folders() for path in folder.iterdir()
        }
        self._finished: set[Path] = set()

    def steps(self) -> int:
        """Steps measured, those of earlier stretches included; 0 until this one writes records."""
        if self._state(self._records)[0] in (0, self._inode):  # a resume writes them anew
            return 0
        return self._records.read_bytes().count(b"\n")

    def saving(self) -> Path | None:
        """The checkpoint that this stretch has begun, and not finished."""
        for folder in self._folders():
            if folder in self._finished:
                continue
            if self.wrote(folder / TRAINER_STATE):
                self._finished.add(folder)
            else:
                with contextlib.suppress(FileNotFoundError):  # deleted at this moment
                    if any(self.wrote(path) for path in folder.iterdir()):
                        return folder
        return None

    def finished(self) -> int:
        """The step of the last checkpoint that this stretch has finished; 0 for none."""
        self.saving()
        return max((_step(folder) for folder in self._finished), default=0)

    def deleting(self, files: int) -> bool:
        """Whether an older checkpoint of so many files is being deleted."""
        newest = self.finished()
        older = [path for path in self._folders() if _step(path) < newest]
        with contextlib.suppress(FileNotFoundError):
            return any(len(os.listdir(path)) < files for path in older)  # noqa: PTH208
        return False

    def wrote(self, path: Path) -> bool:
        return self._state(path) not in ((0, 0), self._before.get(path))

    def _folders(self) -> list[Path]:
        return list(self._folder.glob("checkpoint-*"))

    @staticmethod
    def _state(path: Path) -> tuple[int, int]:
        try:
            status = path.stat()
        except FileNotFoundError:
            return 0, 0
        return status.st_ino, status.st_mtime_ns


# --------------------------------------------------------------------------------- kill and resume


class Kill(NamedTuple):
    """One kill and what it left."""

    kind: str
    everything: bool  # the loader workers, too
    resumed_from: int  # the checkpoint at which this stretch began; 0 for none
    logged: int | None  # the first step that it logged; None if it was killed before
    step: int  # the last whole record
    complete: int  # the newest complete checkpoint; 0 for none
    unfinished: dict[int, str]  # saves that were not finished, and their first missing file
    remains: dict[int, str]  # older checkpoints that were being deleted

    def __str__(self) -> str:
        text = f"{self.kind:12} {'all' if self.everything else 'main':4}"
        text += f" from {self.resumed_from:3} to {self.step:3}, complete {self.complete:3}"
        for title, folders in (("unfinished", self.unfinished), ("remains", self.remains)):
            text += "".join(f", {title} {step} ({what})" for step, what in folders.items())
        return text


def run_whole(starter: Starter, folder: Path, text: Path, flags: Sequence[str]) -> Whole:
    """Train without being killed."""
    folder.mkdir(parents=True)
    log = folder.with_suffix(".log")
    _expect_success(starter.start(_command(folder, text, (*flags, *KEEP_ALL)), log), log)
    return Whole(folder)


def kill_and_resume(
    starter: Starter,
    whole: Whole,
    folder: Path,
    text: Path,
    flags: Sequence[str],
    *,
    kills: int,
    seed: int,
    command_line: Sequence[int] = (),
    tell: Callable[[Kill], object] = lambda kill: None,
) -> list[Kill]:
    """Train the same, killed at random moments, and compare it after each kill and at the end.

    `command_line` are the kills before and after which the process is a fresh interpreter's. The
    last kill comes when the last checkpoint is there, and what follows training is at work.
    """
    folder.mkdir(parents=True)
    dice = random.Random(seed)
    done: list[Kill] = []
    log = folder.with_suffix(".log")
    for number, (kind, until) in enumerate(_schedule(whole, kills, dice)):
        by_command_line = number in command_line or number - 1 in command_line
        start, resumed_from = _arguments(folder, text, flags, whole)
        progress = Progress(folder)
        process = starter.start(start, log, command_line=by_command_line)
        if by_command_line and kind == "start-up":
            kind = "progress"  # else it would mostly be importing torch
        deadline = time.monotonic() + PATIENCE
        for pause in _moments(kind, until, progress, whole, dice):
            if process.poll(pause) is not None:
                break
            if time.monotonic() > deadline:
                raise Difference(f"a stretch of the run hangs, for all of {PATIENCE:.0f} s: {log}")
        everything = dice.random() < 0.5
        if process.kill(everything=everything) != -signal.SIGKILL:
            _expect_success(process, log)
            break  # it was faster: nothing was killed
        done.append(_look(whole, folder, log, kind, resumed_from, everything=everything))
        tell(done[-1])
    start, resumed_from = _arguments(folder, text, flags, whole)
    _expect_success(starter.start(start, log), log)
    _compare_ends(whole, folder)
    return done


def _schedule(whole: Whole, kills: int, dice: random.Random) -> list[tuple[str, float]]:
    """The kind of each kill, and the step that it comes after.

    One kill in each part of the run, so that the run does not end before all of them have come.
    """
    part = whole.steps / kills
    kinds = [KINDS[number % len(KINDS)] for number in range(kills - 1)]
    dice.shuffle(kinds)
    plan = [(kind, part * (number + dice.random())) for number, kind in enumerate(kinds)]
    for number in range(len(plan)):
        if changes := [step for step in whole.changes if number <= step / part < number + 1]:
            plan[number] = "growth", dice.choice(changes)
    return [*plan, ("end", whole.steps)]


def _command(folder: Path, text: Path, flags: Sequence[str]) -> list[str]:
    return ["pretrain", *FLAGS, *flags, "--dataset", str(text), "--output_dir", str(folder)]


def _arguments(
    folder: Path, text: Path, flags: Sequence[str], whole: Whole
) -> tuple[list[str], int]:
    """The command that goes on, and the checkpoint that it should find."""
    command, complete = _command(folder, text, flags), _newest_complete(folder, whole)
    if complete:
        return [*command, "--resume_from_checkpoint", "true"], complete
    return command, 0  # killed before its first save was complete: it begins again


def _newest_complete(folder: Path, whole: Whole) -> int:
    """By the bytes of the uninterrupted run, not by what the package takes for complete."""
    for step, path in reversed(checkpoints(folder).items()):
        if not damage(path, whole.folder / path.name):
            return step
    return 0


def _moments(
    kind: str, until: float, progress: Progress, whole: Whole, dice: random.Random
) -> Iterator[float]:
    """Pass the time until the kill is due; yields for how long nothing needs to be looked at."""
    while kind != "start-up" and progress.steps() < until:
        yield 0.0005
    files = sorted((whole.folder / f"checkpoint-{whole.steps}").iterdir())
    if kind == "save":
        # Once a file chosen at random is being written, so that any may be torn.
        name = dice.choice([path.name for path in files if path.name != TRAINER_STATE])
        while not ((saving := progress.saving()) and progress.wrote(saving / name)):
            yield 0.0
        delay = dice.uniform(0, 0.002)
    elif kind == "deletion":
        finished = progress.finished()
        while progress.finished() == finished:
            yield 0.0
        end = time.monotonic() + 0.005
        while time.monotonic() < end and not progress.deleting(len(files)):
            yield 0.0
        delay = dice.choice([0, 0.0001])
    elif kind in ("growth", "end"):
        while progress.finished() < until:
            yield 0.0
        delay = dice.uniform(0, 0.01 if kind == "growth" else 0.2)
    else:
        delay = dice.uniform(0, 0.02 if kind == "progress" else 0.3)
    end = time.monotonic() + delay
    while time.monotonic() < end:
        yield 0.0


def _look(
    whole: Whole, folder: Path, log: Path, kind: str, resumed_from: int, *, everything: bool
) -> Kill:
    """Compare what a kill has left with the uninterrupted run."""
    torn = {}
    for step, path in checkpoints(folder).items():
        if what := damage(path, whole.folder / path.name):
            torn[step] = what
    complete = _newest_complete(folder, whole)
    records = read_records(folder) if (folder / RECORDS_FILE).exists() else {"step": []}
    kill = Kill(
        kind=kind,
        everything=everything,
        resumed_from=resumed_from,
        logged=_first_logged_step(log, whole),
        step=len(records["step"]),
        complete=complete,
        unfinished={step: what for step, what in torn.items() if step > complete},
        remains={step: what for step, what in torn.items() if step < complete},
    )
    try:
        taken = _step(Path(last_complete_checkpoint(folder)))
    except ValueError:
        taken = 0
    if taken != complete:
        raise Difference(f"checkpoint-{taken} is taken for complete in {folder}: {kill}")
    if any(whole.records[name][: kill.step] != values for name, values in records.items()):
        raise Difference(f"records differ in {folder}: {kill}")
    if kill.logged not in (None, resumed_from + 1):
        raise Difference(f"resumed at step {kill.logged} in {folder}: {kill}")
    # A step is recorded before it is saved.
    if not max(0, (kill.step - 1) // SAVE_STEPS * SAVE_STEPS) <= complete <= kill.step:
        raise Difference(f"more was lost than the steps since the last save in {folder}: {kill}")
    return kill


def _first_logged_step(log: Path, whole: Whole) -> int | None:
    found = re.search(rb"'adaptive_batch/samples_seen': (\d+)[,}]", log.read_bytes())
    return whole.records["samples_seen"].index(int(found[1])) + 1 if found else None


def _expect_success(process: Process, log: Path) -> None:
    if (status := process.poll(PATIENCE)) != 0:
        output = log.read_text("utf-8", "replace")[-4000:]
        raise Difference(f"the run ended with status {status}, None for never:\n{output}")


def _compare_ends(whole: Whole, folder: Path) -> None:
    last = f"checkpoint-{whole.steps}"
    same = {
        "records": read_records(folder) == whole.records,
        "history": history(folder) == whole.history,
        "last checkpoint": not damage(folder / last, whole.folder / last),
        "weights": _weights(folder) == _weights(whole.folder) == _weights(whole.folder / last),
    }
    if not all(same.values()):
        names = [name for name, value in same.items() if not value]
        raise Difference(f"{', '.join(names)} differ at the end: {folder} and {whole.folder}")


def _weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def write_text(folder: Path) -> Path:
    """A text that every machine has, in paragraphs, as three shards."""
    shards = folder / "text"
    shards.mkdir(exist_ok=True)
    paragraphs = Path(argparse.__file__).read_text("utf-8").split("\n\n")
    for shard in range(3):
        lines = [json.dumps({"text": paragraph}) for paragraph in paragraphs[shard::3]]
        (shards / f"{shard}.jsonl").write_text("\n".join(lines), "utf-8")
    return shards


# --------------------------------------------------------------------------------------- the script


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--flavour", choices=sorted(FLAVOURS), help="default: all")
    parser.add_argument("--folder", type=Path, help="kept; default: a temporary one")
    parser.add_argument("--zygote", type=int, help=argparse.SUPPRESS)
    parser.add_argument("flags", nargs="*", help="further flags of pretrain, after --")
    options = parser.parse_args()
    if options.zygote is not None:
        return _zygote(Connection(options.zygote))
    folder = options.folder or Path(tempfile.mkdtemp(prefix="kill_and_resume-"))
    flavours = list(FLAVOURS) if options.flavour is None else [options.flavour]
    kills: list[Kill] = []

    def tell(kill: Kill) -> None:
        kills.append(kill)
        print(f"{len(kills):4} {kill}", flush=True)

    began = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    text, wholes, number = write_text(folder), {}, 0
    with Starter() as starter:
        while len(kills) < options.kills:
            flavour = flavours[number % len(flavours)]
            flags = (*FLAVOURS[flavour], *options.flags)
            if flavour not in wholes:
                wholes[flavour] = run_whole(starter, folder / f"whole-{flavour}", text, flags)
            whole, seed = wholes[flavour], options.seed * 1000 + number
            sizes = " -> ".join(map(str, dict.fromkeys(whole.sizes)))
            print(f"run {number}: {flavour}, steps {whole.steps}, sizes {sizes}")
            kill_and_resume(
                starter,
                whole,
                folder / f"killed-{number}",
                text,
                flags,
                kills=min(KILLS_PER_RUN, options.kills - len(kills)),
                seed=seed,
                command_line=[KILLS_PER_RUN // 2] if number == 0 else [],
                tell=tell,
            )
            shutil.rmtree(folder / f"killed-{number}")
            number += 1
        survivors = starter.survivors()
    if options.folder is None:
        shutil.rmtree(folder)
    torn = Counter(what for kill in kills for what in kill.unfinished.values())
    print(f"kinds       {dict(Counter(kill.kind for kill in kills))}")
    print(
        f"unfinished  {sum(bool(kill.unfinished) for kill in kills)} kills left an unfinished save"
    )
    print(f"            first file not whole: {dict(torn.most_common())}")
    print(f"remains     {sum(bool(kill.remains) for kill in kills)} left one half deleted")
    print(f"survivors   {', '.join(survivors) or 'none'}")
    print(f"{len(kills)} kills in {number} runs, {time.monotonic() - began:.0f} s: no difference")
    return 1 if survivors else 0


if __name__ == "__main__":
    raise SystemExit(main())
