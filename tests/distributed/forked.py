"""Processes forked from one that has imported everything: importing takes longer than a tiny run.

They are what a launcher such as torchrun starts; ``test_launch`` tests visper's own.
"""

import multiprocessing
import os
import socket
import sys
import time
from pathlib import Path

from torch.multiprocessing import start_processes

from visper.config import load_run

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["visper.cli", "visper.training", "visper.evaluation.while_training", "visper.planning.recomputation"]
)

LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def run_forked(function, arguments, count):
    """Runs ``function(rank, *arguments)`` in ``count`` processes; an exception in one ends all and is raised."""
    start_processes(function, arguments, count, start_method="forkserver")


def train_forked(recipe, arguments, timeout, verb="train"):
    """``visper train``, or another command, in as many processes as the run asks for. Returns exit codes and output.

    Processes that still run after ``timeout`` seconds, or half a minute after another has failed, are killed.
    """
    options = [argument for argument in arguments if argument.startswith("--")]
    overrides = [argument for argument in arguments if argument not in options]
    count = load_run(recipe, overrides).launch.processes
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    outputs = [recipe.with_suffix(f".{rank}.txt") for rank in range(count)]
    started = []
    for rank, output in enumerate(outputs):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        environment = place | {name: str(value) for name, value in ranks.items()} if count > 1 else {}
        command = ["visper", verb, str(recipe), *overrides, *options]
        process = FORKS.Process(target=_visper, args=(command, environment, str(output)))
        process.start()
        started.append(process)
    until = time.monotonic() + timeout
    for process in started:
        process.join(max(0.0, until - time.monotonic()))
        if process.exitcode:
            until = min(until, time.monotonic() + 30)
    for process in started:
        process.kill()
        process.join()
    return [process.exitcode for process in started], "".join(output.read_text() for output in outputs)


def _visper(command, environment, output):
    with Path(output).open("w", buffering=1, encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for name in LAUNCHERS:  # the fork server may have been started with some
        os.environ.pop(name, None)
    os.environ.update(environment | {"OMP_NUM_THREADS": "1"})
    sys.argv = command
    import torch

    from visper.cli import main

    torch.set_num_threads(1)
    main()
