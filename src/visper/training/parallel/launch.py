"""Starting a run's processes on this machine and waiting for them. On several machines that is torchrun's task."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from visper.common.errors import ConfigError, ProcessFailedError, StoppedError
from visper.config import Launch
from visper.training.parallel.deepspeed import require_deepspeed

PROGRAM = (sys.executable, "-m", "visper")
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
POLL_S = 0.1
GRACE_S = 10.0
"""Seconds that the other processes have to end after one failed; those waiting for it never end by themselves."""
PR_SET_PDEATHSIG = 1


TRAINING_GOES_ON = "--resume goes on from the newest complete checkpoint, if there is one"


def start_processes(launch: Launch, command: Sequence[str], remedy: str = TRAINING_GOES_ON) -> bool:
    """Runs ``visper COMMAND`` in as many processes as ``launch`` says, and waits for them.

    SIGTERM, SIGINT and SIGHUP tell every process to save and end; they have as long as they need. A second Ctrl-C kills
    them. Should this process be killed, the kernel kills them too (Linux).

    Args:
        remedy: how to go on after a process has failed, for the error's message.

    Returns:
        False where there is nothing to start: one process is asked for, or a launcher has started this one.

    Raises:
        ConfigError: a launcher started another number of processes on this machine.
        ProcessFailedError: one of them failed; it has printed why.
        StoppedError: told to stop, and a process ended without saving.
        SystemExit: told to stop; the first process has printed what was saved.
    """
    started = os.environ.get("LOCAL_WORLD_SIZE")
    if started is not None:
        if launch.processes not in (1, int(started)):
            raise ConfigError(
                f"launch.processes is {launch.processes}, but a launcher started {started} on this machine: "
                "leave it out under torchrun"
            )
        return False
    if launch.processes == 1:
        return False
    require_deepspeed(launch)
    processes: list[subprocess.Popen] = []
    with _passing_signals_on(processes) as received:
        port = _free_port()
        for rank in range(launch.processes):
            processes.append(_start(rank, launch.processes, port, command))
        failed = _wait(processes)
    _report(processes, failed, received, remedy)
    return True


def _start(rank: int, count: int, port: int, command: Sequence[str]) -> subprocess.Popen:
    """One process with torchrun's environment, in a session of its own: a terminal's Ctrl-C reaches the launcher only,
    which passes it on once."""
    environment = {
        "OMP_NUM_THREADS": "1",
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return subprocess.Popen(
        [*PROGRAM, *command],
        env=environment,
        start_new_session=True,
        preexec_fn=_dies_with_parent(),  # noqa: PLW1509 - the launcher has one thread
    )


def _dies_with_parent() -> Callable[[], None] | None:
    """What a child runs before its program: it asks the kernel to be killed when its parent ends. None but on Linux."""
    if not sys.platform.startswith("linux"):
        return None
    prctl, parent = ctypes.CDLL(None, use_errno=True).prctl, os.getpid()

    def ask() -> None:
        if prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
        if os.getppid() != parent:  # it ended before the kernel was asked
            os.kill(os.getpid(), signal.SIGKILL)

    return ask


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def _passing_signals_on(processes: Sequence[subprocess.Popen]) -> Iterator[list[signal.Signals]]:
    """Passes signals that ask to stop on to the processes, as SIGTERM, and yields the list of those received."""
    received: list[signal.Signals] = []

    def pass_on(number: int, frame: Any) -> None:
        again = number == signal.SIGINT and signal.SIGINT in received
        received.append(signal.Signals(number))
        for process in processes:
            process.send_signal(signal.SIGKILL if again else signal.SIGTERM)

    before = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for process in processes:
            if process.poll() is None:
                process.kill()


def _wait(processes: Sequence[subprocess.Popen]) -> int | None:
    """Waits for all to end and returns the rank that failed first, if any; the others are then ended."""
    first, until = None, float("inf")
    while True:
        codes = [process.poll() for process in processes]
        failed = [rank for rank, code in enumerate(codes) if code not in (None, 0, StoppedError.exit_code)]
        if failed and first is None:
            first, until = failed[0], time.monotonic() + GRACE_S
            for process in processes:
                process.terminate()
        if None not in codes:
            return first
        if time.monotonic() > until:
            for process in processes:
                process.kill()
        time.sleep(POLL_S)


def _report(
    processes: Sequence[subprocess.Popen], failed: int | None, received: Sequence[signal.Signals], remedy: str
) -> None:
    """Says what was seen: the signal, and the exit code of the process that failed first."""
    if failed is None:
        if any(process.returncode == StoppedError.exit_code for process in processes):
            raise SystemExit(StoppedError.exit_code)
        return
    code = processes[failed].returncode
    ended = f"process {failed} of {len(processes)} ended with exit code {code}"
    why = "its own message stands above"
    if code == -signal.SIGKILL:
        why = "it was killed (SIGKILL) and could say nothing; the system does that where memory ends (see dmesg)"
    if received:
        raise StoppedError(
            f"told to stop ({received[0].name}), but {ended}, which means that it did not save: {remedy}"
        )
    raise ProcessFailedError(f"{ended}, the others were stopped: {why}. Fix the cause; {remedy}")
