"""Results keep the items' order, and the work does not change the global random state."""

import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from visper.common.parallel import in_order


def square(number: int) -> int:
    return number * number


def large(number: int) -> bytes:
    return bytes(1_000_000)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("count", [0, 1, 200])
def test_results_come_in_order(count: int, workers: int) -> None:
    assert list(in_order(square, range(count), "", quiet=True, workers=workers)) == [i * i for i in range(count)]


@pytest.mark.parametrize("workers", [0, 2])
def test_weights_drawn_afterwards_are_those_drawn_without(workers: int) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(in_order(square, range(10), "", quiet=True, workers=workers))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such setting")
def test_a_process_that_keeps_freed_memory_does_not_ask_for_it_again() -> None:
    code = """
import resource
from visper.common.parallel import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        blocks = [b"1" * 20_000_000 for _ in range(3)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
returned = faults()
keep_freed_memory()
faults()
print(returned, faults())
"""
    returned, kept = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    pages = 5 * 3 * 20_000_000 // resource.getpagesize()
    assert int(kept) < pages / 50 < int(returned)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_processes_end_when_the_one_that_started_them_is_killed(method: str) -> None:
    """Their results fill the pipe that nobody reads any more."""
    code = f"""
import multiprocessing, time
multiprocessing.set_start_method("{method}")
from tests.common.test_parallel import large
from visper.common.parallel import in_order
results = in_order(large, range(64), "", quiet=True, workers=2)
for _ in range(32):  # takes longer than the processes' first look for their parent
    next(results)
    time.sleep(0.05)
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as main:
        children = [int(number) for number in main.stdout.readline().split()]
        main.kill()
    assert len(children) == 2
    until = time.monotonic() + 30
    while left := [child for child in children if Path(f"/proc/{child}").exists()]:
        assert time.monotonic() < until, f"still running: {left}"
        time.sleep(0.1)
