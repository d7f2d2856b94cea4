"""The output of a run that goes to a file: lines for people, no progress bars."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}


@pytest.mark.slow
def test_a_log_in_a_file_has_lines_and_no_bars(tmp_path, tiny_llm, tiny_encoder):
    recipe = tiny.write_recipe(tmp_path, "pt", tiny_llm, tiny_encoder, max_steps=3)
    command = [sys.executable, "-m", "visper", "train", str(recipe)]
    with (tmp_path / "log.txt").open("w") as log:
        subprocess.run(command, env=ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT, check=True)
    said = (tmp_path / "log.txt").read_bytes().decode()
    for bar in ("\r", "Loading weights", "Writing model shards", "it/s", "Setting accelerator"):
        assert bar not in said
    assert [f"step {number}/3  loss" in said for number in (1, 2, 3)] == [True] * 3
