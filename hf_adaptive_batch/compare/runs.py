"""Training runs as processes: some at a time, and all of them ended when the user asks for it."""

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from .folders import LOG_FILE, begin, finish, is_finished, read_result
from .machine import visible_gpus
from .plan import PRETRAIN, ComparePlan, Run
from .rules import search_path


_GRACE_SECONDS = 40.0  # torchrun gives the processes that it started 30
_POLL_SECONDS = 0.05


class Interrupted(Exception):
    """The user, or the system, asked to stop; `number` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a run ended.

    Attributes:
        run: The run.
        status: Exit status; 0 if it finished.
        seconds: From start to end; of the last start, if it was broken off before.
        kept: Whether it had finished in an earlier comparison.
    """

    run: Run
    status: int
    seconds: float
    kept: bool


@dataclass(frozen=True, kw_only=True)
class _Child:
    run: Run
    process: subprocess.Popen[bytes]
    started: float


def command_of(plan: ComparePlan, words: Sequence[str]) -> list[str]:
    """A command as the plan starts it.

    Args:
        plan: The plan.
        words: Flags.

    Returns:
        Launcher, program and flags.
    """
    python = [] if plan.launches_python else [sys.executable]
    return [*plan.launch, *(plan.program or (*python, *PRETRAIN)), *words]


def run_all(
    plan: ComparePlan, runs: Sequence[Run], ended: Callable[[Ended], None], *, lock: int
) -> None:
    """Run those that have not finished; end all when asked to stop.

    Args:
        plan: The plan.
        runs: The runs, in the order that they are begun.
        ended: Called with each when it ends. An error that it raises ends the others.
        lock: File descriptor that the runs hold open as long as they live.

    Raises:
        Interrupted: If a signal came.
    """
    waiting, active = deque(runs), dict[int, _Child]()
    spread = plan.jobs > 1 and not plan.launch
    devices = [gpu.device for gpu in visible_gpus()] if spread else []
    with _stop_signals() as signals:
        try:
            while True:
                if signals:
                    raise Interrupted(signals[0])
                if not waiting and not active:
                    break
                free = [slot for slot in range(plan.jobs) if slot not in active]
                if waiting and free:
                    run = waiting.popleft()
                    if is_finished(run):
                        ended(Ended(run=run, status=0, seconds=0.0, kept=True))
                    else:
                        active[free[0]] = _start(plan, run, free[0], devices, lock)
                    continue
                time.sleep(_POLL_SECONDS)
                for slot, child in list(active.items()):
                    status = child.process.poll()
                    if status is not None:
                        del active[slot]
                        ended(_conclude(child, status, plan.jobs))
        finally:
            _end(list(active.values()), signals)


def environment() -> dict[str, str]:
    """Of the processes that a comparison starts."""
    variables = {**os.environ, "PATH": search_path()}
    variables.setdefault("PYTHONUNBUFFERED", "1")  # what it printed is there when it is killed
    return variables


def _start(plan: ComparePlan, run: Run, slot: int, devices: Sequence[str], lock: int) -> _Child:
    variables = environment()
    if plan.jobs > 1 and not plan.launch:
        cores = len(os.sched_getaffinity(0))
        variables.setdefault("OMP_NUM_THREADS", str(max(1, cores // plan.jobs)))
        if len(devices) > 1:
            variables["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
    resume = _checkpoint_of(run)
    if resume and not plan.program:
        resume = "true"
    begin(run, plan.identity(run))
    with (run.folder / LOG_FILE).open("ab" if resume else "wb") as log:
        process = subprocess.Popen(
            command_of(plan, run.words(resume)),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=variables,
            pass_fds=[lock],
            start_new_session=True,  # so that all of its processes can be ended together
        )
    return _Child(run=run, process=process, started=time.monotonic())


def _checkpoint_of(run: Run) -> str | None:
    if not any(run.folder.glob("checkpoint-*")):
        return None
    from ..checkpoint import find_complete_checkpoint  # torch and transformers take seconds

    return find_complete_checkpoint(run.folder)


def _conclude(child: _Child, status: int, jobs: int) -> Ended:
    seconds = time.monotonic() - child.started
    if status == 0:
        read_result(child.run)  # what cannot be compared has not finished
        finish(child.run, seconds, jobs)
    else:
        _signal([child], signal.SIGKILL)  # what a crash left of its processes
    return Ended(run=child.run, status=status, seconds=seconds, kept=False)


def _end(children: Sequence[_Child], signals: Sequence[int]) -> None:
    """Ask them to end, and make them when they do not, or when the user asks again."""
    asked = len(signals)
    _signal(children, signal.SIGTERM)
    deadline = time.monotonic() + _GRACE_SECONDS
    while any(child.process.poll() is None for child in children):
        if time.monotonic() > deadline or len(signals) > asked:
            break
        time.sleep(_POLL_SECONDS)
    _signal(children, signal.SIGKILL)  # also what a leader left behind in its group
    for child in children:
        child.process.wait()


def _signal(children: Sequence[_Child], number: int) -> None:
    for child in children:
        try:
            os.killpg(child.process.pid, number)
        except (ProcessLookupError, PermissionError):
            pass


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collects the signals to stop, instead of breaking off in the middle of starting a run."""
    received: list[int] = []
    before = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            before[number] = signal.signal(number, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
