"""The launcher passes signals on once, says what it saw, and leaves no process behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "LOCAL_WORLD_SIZE"} | {"PYTHONPATH": str(ROOT / "src")}
WAIT_S = 60
LAUNCHER = """
import sys
from visper.common.errors import VisperError
from visper.config import Launch
from visper.training.parallel import launch
launch.PROGRAM = (sys.executable, "-c")
launch.GRACE_S = 1.0
try:
    launch.start_processes(Launch(processes=2), [sys.argv[1]])
except VisperError as error:
    print(error)
    sys.exit(error.exit_code)
"""
SAVES = """
import os, pathlib, signal, sys, time
rank = os.environ["RANK"]
def save(*_):
    with open("told", "a") as file:
        file.write(rank)
    time.sleep(0.5)
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
pathlib.Path(rank).write_text(str(os.getpid()))
time.sleep(60)
"""
STUBBORN = SAVES.replace("signal.signal(signal.SIGTERM, save)", "signal.signal(signal.SIGTERM, signal.SIG_IGN)")
UNPREPARED = SAVES.replace("signal.signal(signal.SIGTERM, save)", "")
FAILS = STUBBORN.replace("time.sleep(60)", "sys.exit(3) if rank == '1' else time.sleep(60)")
KILLED = STUBBORN.replace("time.sleep(60)", "os.kill(os.getpid(), 9) if rank == '1' else time.sleep(60)")


@pytest.fixture
def start(tmp_path):
    """Starts a launcher of two processes that run the given program; returns once both have begun."""
    started = []

    def begin(program):
        command = [sys.executable, "-c", LAUNCHER, program]
        options = {"cwd": tmp_path, "env": ENVIRONMENT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        started.append(subprocess.Popen(command, text=True, start_new_session=True, **options))
        wait_for(lambda: all(begun(tmp_path / rank) for rank in "01"))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()


def begun(file):
    return file.exists() and file.read_text() != ""


def wait_for(condition):
    until = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


def has_ended(folder, rank):
    """Gone, or a zombie that only waits for whoever reaps orphans here."""
    stat = Path("/proc", (folder / rank).read_text(), "stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's help is Linux's")
def test_a_killed_launcher_takes_its_processes_with_it(start, tmp_path):
    start(STUBBORN).send_signal(signal.SIGKILL)
    wait_for(lambda: all(has_ended(tmp_path, rank) for rank in "01"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_each_process_is_told_once_has_its_time_and_speaks_for_itself(start, tmp_path, number):
    run = start(SAVES)
    os.killpg(run.pid, number)  # as a terminal does
    said, _ = run.communicate(timeout=WAIT_S)
    assert (run.returncode, said) == (143, "")
    assert sorted((tmp_path / "told").read_text()) == ["0", "1"]


def test_a_process_that_could_not_save_is_named(start):
    run = start(UNPREPARED)
    run.send_signal(signal.SIGTERM)
    said, _ = run.communicate(timeout=WAIT_S)
    assert run.returncode == 143
    assert "stopped by SIGTERM, but process 0 of 2 ended with exit code -15" in said and "did not save" in said


def test_a_second_ctrl_c_kills(start):
    run = start(STUBBORN)
    for _ in range(2):
        run.send_signal(signal.SIGINT)
        time.sleep(0.3)
    said, _ = run.communicate(timeout=5)
    assert run.returncode == 143 and "exit code -9" in said


def test_when_one_process_fails_the_others_are_stopped(start, tmp_path):
    run = start(FAILS)
    said, _ = run.communicate(timeout=WAIT_S)
    assert run.returncode == 3 and "process 1 of 2 ended with exit code 3" in said, "its own code"
    assert has_ended(tmp_path, "0")


def test_a_process_that_was_killed_is_said_to_have_left_no_message(start):
    run = start(KILLED)
    said, _ = run.communicate(timeout=WAIT_S)
    assert run.returncode == 137, "as a shell reports a process that was killed"
    assert "process 1 of 2 ended with exit code -9" in said and "see dmesg" in said and "its own message" not in said
