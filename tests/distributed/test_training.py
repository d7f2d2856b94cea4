"""Two processes train what one trains: same global batch, same weights, also where a rank meets no image."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny

ROOT = Path(__file__).parents[2]

SCRIPT = """
import json, sys
import torch
torch.set_num_threads(1)
from visper.config import Run
from visper.training import run_stage
run_stage(Run.model_validate(json.loads(sys.argv[1])))
"""


def train(settings, processes):
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    script = Path(settings["output"]).with_suffix(".py")
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "1"}
    command = [*launch, str(script), json.dumps(settings)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = (Path(settings["output"]) / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if '"ntp"' in line]


@pytest.mark.slow
@pytest.mark.parametrize("images", [9, 3], ids=["both ranks see", "some ranks see no image"])
def test_two_ranks_equal_one(images, tiny_llm, tiny_encoder, tmp_path):
    rows = tiny.write_rows(tmp_path / "rows", images=images, text_rows=12 - images)
    results = {}
    for processes in (1, 2):
        settings = {
            "name": "pt",
            "stage": "pt",
            "output": str(tmp_path / f"ranks-{processes}"),
            "student": {"llm": str(tiny_llm), "encoder": str(tiny_encoder)},
            "data": {"sources": [{"json": str(rows / "rows.json"), "images": str(rows / "images")}], "workers": 0},
            "distillation": tiny.distillation(),
            "optimisation": {"global_batch": 4, "micro_batch": 4 // processes, "lr": 1e-3, "precision": "float32"},
            "logging": {"every": 1},
        }
        results[processes] = (train(settings, processes), settings["output"])
    (one_logs, one), (two_logs, two) = results[1], results[2]
    assert len(one_logs) == len(two_logs) == 3
    for a, b in zip(one_logs, two_logs, strict=True):
        for name, value in a.items():
            # float32, summed in another order; largest relative difference seen 2e-6
            assert b[name] == pytest.approx(value, rel=5e-5, abs=1e-6), name
    ours, theirs = (load_file(Path(folder) / "model" / "model.safetensors") for folder in (one, two))
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=0, atol=1e-4)
