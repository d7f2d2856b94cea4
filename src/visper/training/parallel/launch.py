"""Starts a run's processes on one machine and waits for them. Use torchrun for several machines."""

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
from visper.common.ranks import LAUNCHED
from visper.config import Launch
from visper.training.parallel.deepspeed import require_deepspeed

PROGRAM = (sys.executable, "-m", "visper")
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
POLL_S = 0.1
GRACE_S = 10.0
"""Seconds that the other processes have to end after one has failed; those waiting for it never end by themselves."""
PR_SET_PDEATHSIG = 1

TRAINING_GOES_ON = "--resume continues from the newest complete checkpoint, if there is one"


def start_processes(launch: Launch, command: Sequence[str], remedy: str = TRAINING_GOES_ON) -> bool:
    """Runs ``visper COMMAND`` in ``launch.processes`` processes and waits for them.

    On SIGTERM, SIGINT and SIGHUP every process saves and ends; there is no time limit. A second Ctrl-C kills them. If
    this process is killed, the kernel kills them too (Linux).

    Args:
        remedy: how to continue after a process has failed, for the error message.

    Returns:
        False if nothing was started, because ``launch.processes`` is 1 or a launcher started this process.

    Raises:
        ConfigError: a launcher started a different number of processes on this machine.
        ProcessFailedError: a process failed; it has printed why.
        StoppedError: stopped by a signal, and a process ended without saving.
        SystemExit: stopped by a signal; the first process has printed what was saved.
    """
    started = os.environ.get("LOCAL_WORLD_SIZE")
    if started is not None:
        if launch.processes not in (1, int(started)):
            raise ConfigError(
                f"launch.processes is {launch.processes}, but a launcher started {started} on this machine: "
                "do not set it under torchrun"
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
    """Starts one process with torchrun's environment variables.

    It has its own session, so that Ctrl-C in a terminal reaches only the launcher, which passes it on once.
    """
    environment = {
        "OMP_NUM_THREADS": "1",
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        LAUNCHED: "1",
    }
    return subprocess.Popen(
        [*PROGRAM, *command],
        env=environment,
        start_new_session=True,
        preexec_fn=_dies_with_parent(),  # noqa: PLW1509 - the launcher has one thread
    )


def _dies_with_parent() -> Callable[[], None] | None:
    """Runs in the child before its program, so that the kernel kills it when its parent ends; None except on Linux."""
    if not sys.platform.startswith("linux"):
        return None
    prctl, parent = ctypes.CDLL(None, use_errno=True).prctl, os.getpid()

    def ask() -> None:
        if prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
        if os.getppid() != parent:  # the parent ended before prctl
            os.kill(os.getpid(), signal.SIGKILL)

    return ask


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def _passing_signals_on(processes: Sequence[subprocess.Popen]) -> Iterator[list[signal.Signals]]:
    """Forwards stop signals to the processes as SIGTERM, and yields the list of signals received."""
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
    """Waits for all processes to end; if one fails, stops the others and returns the rank that failed first."""
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
    """Raises the error for the signals received and for the process that failed first, if any."""
    if failed is None:
        if any(process.returncode == StoppedError.exit_code for process in processes):
            raise SystemExit(StoppedError.exit_code)
        return
    code = processes[failed].returncode
    ended = f"process {failed} of {len(processes)} ended with exit code {code}"
    why = "see its own message above"
    if code == -signal.SIGKILL:
        why = "it was killed by SIGKILL, probably because the machine ran out of memory (see dmesg)"
    if received:
        raise StoppedError(f"stopped by {received[0].name}, but {ended}, so it did not save: {remedy}")
    raise ProcessFailedError(f"{ended}, the others were stopped: {why}. Fix the cause; {remedy}", code)
