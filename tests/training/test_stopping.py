"""A signal to the process group, loader processes included, ends a run with a checkpoint."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests import tiny

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
WAIT_S = 120


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_group_saves_and_ends(number, tmp_path, tiny_llm, tiny_encoder):
    rows = tiny.write_rows(tmp_path / "rows")
    settings = {
        "name": "ift",
        "stage": "ift",
        "output": str(tmp_path / "ift"),
        "student": {"llm": str(tiny_llm), "encoder": str(tiny_encoder)},
        "data": {"sources": [{"json": str(rows / "rows.json"), "images": str(rows / "images")}], "workers": 2},
        "optimization": {"global_batch": 4, "micro_batch": 2, "lr": 1e-3, "max_steps": 4000, "precision": "float32"},
        "logging": {"every": 1},
    }
    recipe = tmp_path / "run.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "visper", "train", str(recipe)]
    options = {"env": ENVIRONMENT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    run = subprocess.Popen(command, start_new_session=True, **options)
    log, until = tmp_path / "ift" / "log.jsonl", time.monotonic() + WAIT_S
    while not (log.exists() and len(log.read_text().splitlines()) >= 3):
        assert run.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    os.killpg(run.pid, number)
    said, _ = run.communicate(timeout=WAIT_S)
    assert run.returncode == 128 + signal.SIGTERM and "--resume" in said, said[-3000:]
    assert len(list((tmp_path / "ift" / "checkpoints").glob("checkpoint-*"))) == 1
