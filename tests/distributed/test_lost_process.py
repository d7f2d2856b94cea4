"""Processes that something else than our launcher starts, as torchrun and schedulers do: one dies while all load."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.test_training import make  # noqa: F401

ROOT = Path(__file__).parents[2]
WAIT_S = 120
TRAINS = """
import os, sys
from visper.cli import main
from visper.training import run as training
if os.environ["RANK"] == sys.argv.pop():
    training.build_student = lambda *parts: os._exit(9)
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("lost", "engine"), [(0, "ddp"), (1, "fsdp")])
def test_the_others_end_with_one_line_when_a_process_dies_while_all_load(make, lost, engine):  # noqa: F811
    recipe = make("ift", "run", launch={"engine": engine})
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TRAINS, "train", str(recipe), str(lost)],
            env=os.environ | shared | {"PYTHONPATH": str(ROOT / "src"), "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=WAIT_S)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert processes[lost].returncode == 9
    left = " ".join(said[1 - lost].split())
    assert processes[1 - lost].returncode not in (0, -9) and "Traceback" not in left, left[-3000:]
    assert f"process {1 - lost} of 2 lost contact with the others" in left
    assert not (recipe.with_suffix("") / "model").exists()
