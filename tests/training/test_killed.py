"""A run killed at random moments, again and again, ends with the losses and weights of one that was left alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoConfig

from tests import tiny

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}"}
ROUNDS = int(os.environ.get("VISPER_KILL_ROUNDS", "2"))
SEED = int(os.environ.get("VISPER_KILL_SEED", "0"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pt", "vpt", "ift"])
def test_killed_at_random_moments(stage, tmp_path, tiny_encoder):
    """PT and IFT with dropout, IFT with loader processes, VPT with a CNN."""
    llm = tiny.save_llm(tmp_path / "llm")
    config = AutoConfig.from_pretrained(llm)
    config.attention_dropout = 0.1
    config.save_pretrained(llm)
    rows = tiny.write_rows(tmp_path / "rows", images=10, text_rows=3)  # 13 rows in batches of 4
    student = {"llm": str(llm), "encoder": str(tiny_encoder)}
    if stage == "vpt":
        student = {"llm": str(llm), "encoder": str(tiny.save_cnn(tmp_path / "cnn")), "image_size": 64}
    source = {"json": str(rows / "rows.json"), "images": str(rows / "images")}
    settings = {
        "name": stage,
        "stage": stage,
        "output": "given",
        "student": student,
        "data": {"sources": [source], "workers": 1 if stage == "ift" else 0},
        "optimization": {"global_batch": 4, "micro_batch": 2, "lr": 1e-3, "precision": "float32", "max_steps": 6},
        "logging": {"every": 1, "save_every": 2},
    }
    if stage == "pt":
        settings["distillation"] = tiny.distillation()
    recipe = tmp_path / "run.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "tests.training.killed", str(recipe), str(tmp_path), str(SEED), str(ROUNDS)]
    done = subprocess.run(command, check=False, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] and not found["differing"], (found, done.stderr[-3000:])
