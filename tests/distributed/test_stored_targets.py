"""A store is the same whoever builds it, and two processes that read it train what one with teachers trains."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny
from tests.logs import computed
from tests.target_store.test_build import files_of
from visper.config import Run
from visper.target_store import build as building
from visper.target_store import plan as planning
from visper.training import run_stage

ROOT = Path(__file__).parents[2]

BUILD_AND_TRAIN = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from visper.config import Run
from visper.target_store import build, plan
from visper.training import run_stage
plan.PART_BYTES = 512
run = Run.model_validate(json.loads(sys.argv[1]))
build.build_targets(run, Path(run.distillation.targets), batch=2)
run_stage(run)
"""


@pytest.mark.slow
def test_two_ranks_build_the_store_that_one_builds_and_train_as_with_teachers(
    tiny_llm, tiny_encoder, tmp_path, monkeypatch
):
    rows = tiny.write_rows(tmp_path / "rows", images=9, text_rows=3)
    distillation = tiny.distillation()
    for task in distillation["tasks"].values():
        task["target"] = {**task["target"], "kind": "tests.tiny:HalfColors"}
    live = {
        "name": "pt",
        "stage": "pt",
        "output": str(tmp_path / "live"),
        "student": {"llm": str(tiny_llm), "encoder": str(tiny_encoder)},
        "data": {"sources": [{"json": str(rows / "rows.json"), "images": str(rows / "images")}], "workers": 0},
        "distillation": distillation,
        "optimization": {"global_batch": 4, "micro_batch": 4, "lr": 1e-3, "precision": "float32", "max_steps": 2},
        "logging": {"every": 1},
    }
    stored = {
        **live,
        "output": str(tmp_path / "stored"),
        "distillation": {**distillation, "targets": str(tmp_path / "two")},
        "optimization": {**live["optimization"], "micro_batch": 2},
    }
    script = tmp_path / "build_and_train.py"
    script.write_text(BUILD_AND_TRAIN)
    places = os.pathsep.join((str(ROOT / "src"), str(ROOT)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": places, "ACCELERATE_USE_CPU": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(script), json.dumps(stored)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]

    monkeypatch.setattr(planning, "PART_BYTES", 512)
    building.build_targets(Run.model_validate(live), tmp_path / "one", batch=2, quiet=True)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    assert len(files_of(tmp_path / "one")) == 1 + 3 + 3 * 5
    run_stage(Run.model_validate(live))
    one_logs, two_logs = (computed(tmp_path / name) for name in ("live", "stored"))
    assert len(one_logs) == len(two_logs) == 2
    for one, two in zip(one_logs, two_logs, strict=True):
        for name, value in one.items():
            assert two[name] == pytest.approx(value, rel=5e-5, abs=1e-6), name  # as between one rank and two
    ours, theirs = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("live", "stored"))
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=0, atol=1e-4)
