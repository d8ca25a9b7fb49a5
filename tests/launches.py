"""Runs `accelerate launch` with the configurations of this repository, on the CPU, and kills it.

Each launch is the command with its flags, in a session of its own. What takes long is that the
launcher and every process import torch and transformers: most launches are therefore forked from a
process that has imported everything and run nothing, and their launcher forks the processes that
torch would start as `python -u SCRIPT`. Some (`fresh`) are started as a user starts them.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn


ROOT = Path(__file__).resolve().parents[1]
SHIM = "tests/fsdp_on_cpu.py"
SCRIPT = "examples/pretrain_llama.py"
PATIENCE = 180.0  # seconds for one launch, which takes some five, or twenty when it is fresh


class Launch:
    """One command, its output in a file, and all the processes that come of it."""

    def __init__(self, command: Sequence[str], log: Path, *, fresh: bool = False) -> None:
        self.command, self.log = list(command), log
        self._status: Callable[[], int | None]
        if fresh:
            with log.open("wb") as output:
                popen = subprocess.Popen(
                    [sys.executable, "-m", "accelerate.commands.launch", *command],
                    cwd=ROOT,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    env=environment(),
                )
            self.pid, self._status = popen.pid, popen.poll
        else:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__, "hf_adaptive_batch.pretrain"])
            process = context.Process(target=_launcher, args=(self.command, str(log)))
            process.start()
            assert process.pid is not None
            self.pid, self._status = process.pid, lambda: process.exitcode

    @property
    def ended(self) -> bool:
        return self._status() is not None

    @property
    def output(self) -> str:
        return self.log.read_text("utf-8", "replace")

    def wait(self) -> int:
        """Wait for the end, and leave nothing behind; the exit status."""
        end = time.monotonic() + PATIENCE
        try:
            while (status := self._status()) is None:
                if time.monotonic() > end:
                    raise AssertionError(f"no end after {PATIENCE:.0f} s:\n{self.output[-4000:]}")
                time.sleep(0.02)
            return status
        finally:
            self.kill()

    def expect_success(self) -> Launch:
        if (status := self.wait()) != 0:
            raise AssertionError(f"exit status {status} of {self.command}:\n{self.output[-6000:]}")
        return self

    def processes(self) -> list[int]:
        return _descendants(self.pid)

    def stop(self, processes: Sequence[int]) -> None:
        """Let processes stand still, to look at what they have written."""
        for pid in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)

    def go_on(self, processes: Sequence[int]) -> None:
        for pid in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def kill(self) -> None:
        """End everything at once and without warning."""
        while found := self._signal(signal.SIGKILL):
            end = time.monotonic() + 20
            while any(map(_alive, found)) and time.monotonic() < end:
                self._status()  # reaps
                time.sleep(0.005)
            assert not any(map(_alive, found)), found

    def _signal(self, number: signal.Signals) -> list[int]:
        found = _descendants(self.pid) if self._status() is None else _members(self.pid)
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return found


def launch(
    config: str,
    processes: int,
    flags: Sequence[str],
    log: Path,
    *,
    launcher: Sequence[str] = (),
    shim: bool = False,
    script: str = SCRIPT,
    fresh: bool = False,
) -> Launch:
    """`accelerate launch` with a file of `accelerate_configs`, on this machine's CPU."""
    command = [
        *("--config_file", f"accelerate_configs/{config}.yaml", "--mixed_precision", "no"),
        *("--num_processes", str(processes), "--num_machines", "1", "--machine_rank", "0"),
        *("--main_process_port", str(free_port()), *launcher),
        *((SHIM,) if shim else ()),
        *(script, *flags),
    ]
    return Launch(command, log, fresh=fresh)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def environment() -> dict[str, str]:
    # Also where the package is not installed: pytest finds it by its own setting.
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(path for path in paths if path)
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


# ------------------------------------------------------------------------------ in the launcher


class _Nursery:
    """A process that forks others while it is itself but one thread, as the launcher is not."""

    def __init__(self) -> None:
        self.connection, theirs = multiprocessing.Pipe()
        if os.fork() == 0:
            self.connection.close()
            _fork_on_request(theirs)
        theirs.close()

    def ask(self, *request: Any) -> Any:
        self.connection.send(request)
        return self.connection.recv()


def _fork_on_request(connection: Any) -> NoReturn:
    while True:
        try:
            what, *rest = connection.recv()
        except EOFError:  # the launcher has ended
            os._exit(0)
        if what == "start":
            pid = os.fork()
            if pid == 0:
                connection.close()
                _become(*rest)
            connection.send(pid)
        else:
            pid, status = os.waitpid(rest[0], os.WNOHANG)
            connection.send(os.waitstatus_to_exitcode(status) if pid else None)


class _Forked:
    """What torch's launcher asks of a `subprocess.Popen`."""

    def __init__(self, nursery: _Nursery, args: Sequence[str], env: dict[str, str]) -> None:
        self.nursery, self.args, self.returncode = nursery, list(args), None
        self.pid = nursery.ask("start", self.args, dict(env))

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self.nursery.ask("poll", self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        patience = PATIENCE if timeout is None else timeout
        end = time.monotonic() + patience
        while (status := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.args, patience)
            time.sleep(0.005)
        return status

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def _launcher(command: list[str], log: str) -> None:
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for standard in (1, 2):
        os.dup2(output, standard)
    os.chdir(ROOT)
    os.environ.update(environment())
    multiprocessing.set_start_method("fork", force=True)  # of loader workers, as everywhere
    import accelerate.commands.launch as command_line
    import matplotlib.pyplot  # noqa: F401
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    import hf_adaptive_batch.pretrain  # noqa: F401

    nursery = _Nursery()
    SubprocessHandler._popen = lambda self, args, env: _Forked(nursery, args, env)
    sys.argv = ["accelerate-launch", *command]
    command_line.main()


def _become(args: list[str], env: dict[str, str]) -> NoReturn:
    """Run `python -u SCRIPT ...` in this process, and end it."""
    status: Any = 1
    try:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.SIG_DFL)
        os.environ.clear()
        os.environ.update(env)
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        sys.argv = args[2 if args[1] == "-u" else 1 :]
        sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
        runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


# --------------------------------------------------------------------------------- processes


def _stat(pid: int) -> list[str]:
    """State, parent, group and session."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:4]
    return ["X", "0", "0", "0"]


def _alive(pid: int) -> bool:
    return _stat(pid)[0] not in "ZX"


def _all() -> dict[int, list[str]]:
    found = {int(path.name): _stat(int(path.name)) for path in Path("/proc").glob("[0-9]*")}
    return {pid: stat for pid, stat in found.items() if stat[0] not in "ZX"}


def _descendants(pid: int) -> list[int]:
    """A process and all that came of it, also in sessions of their own, as torch's are."""
    every = _all()
    found = [pid] if pid in every else []
    for parent in found:
        found += [child for child, stat in every.items() if int(stat[1]) == parent]
    return found


def _members(session: int) -> list[int]:
    return [pid for pid, stat in _all().items() if int(stat[3]) == session]
