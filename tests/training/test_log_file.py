"""The output of a run that goes to a file: lines for people, no progress bars."""

import os
import subprocess
import sys
from pathlib import Path

import yaml

from tests import tiny

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}


def test_a_log_in_a_file_has_lines_and_no_bars(tmp_path, tiny_llm, tiny_encoder):
    rows = tiny.write_rows(tmp_path / "rows")
    settings = {
        "name": "pt",
        "stage": "pt",
        "output": str(tmp_path / "pt"),
        "student": {"llm": str(tiny_llm), "encoder": str(tiny_encoder)},
        "data": {"sources": [{"json": str(rows / "rows.json"), "images": str(rows / "images")}], "workers": 0},
        "optimization": {"global_batch": 4, "micro_batch": 2, "lr": 1e-3, "max_steps": 3, "precision": "float32"},
        "logging": {"every": 1},
    }
    recipe = tmp_path / "run.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "visper", "train", str(recipe)]
    with (tmp_path / "log.txt").open("w") as log:
        subprocess.run(command, env=ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT, check=True)
    said = (tmp_path / "log.txt").read_bytes().decode()
    for bar in ("\r", "Loading weights", "Writing model shards", "it/s", "Setting accelerator"):
        assert bar not in said
    assert [f"step {number}/3  loss" in said for number in (1, 2, 3)] == [True] * 3
