"""Rows of several images train as one would have it: nothing depends on how a batch is split, padded or packed."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny
from tests.logs import computed
from visper.config import Run
from visper.training import run_stage


@pytest.fixture
def train(tiny_llm, tiny_encoder, tmp_path):
    """Two steps of eight rows of none to three images: ``train("ift", "name", packing=True)``."""
    rows = tiny.write_several(tmp_path / "rows")

    def run(stage, name, **optimization):
        split = {"global_batch": 8, "micro_batch": 4, "lr": 1e-3, "max_steps": 2, "precision": "float32"}
        settings = {
            "name": name,
            "stage": stage,
            "output": str(tmp_path / name),
            "student": {"llm": str(tiny_llm), "encoder": str(tiny_encoder)},
            "data": {"sources": [{"json": str(rows / "rows.json"), "images": str(rows / "images")}], "workers": 0},
            "optimization": {**split, **optimization},
            "logging": {"every": 1},
        }
        run_stage(Run.model_validate(settings))
        return computed(tmp_path / name), load_file(Path(tmp_path / name / "model" / "model.safetensors"))

    return run


@pytest.mark.parametrize("stage", ["ift", "vpt"])
def test_any_split_gives_the_losses_and_weights_of_any_other_packed_or_padded(train, stage):
    (first_logs, first), *others = [
        train(stage, "one", micro_batch=8),
        train(stage, "split", micro_batch=1),
        train(stage, "packed", packing=True),
    ]
    assert len(first_logs) == 2
    for logs, weights in others:
        for one, other in zip(first_logs, logs, strict=True):
            # float32 sums in another order, as in tests/training/test_run.py
            assert other == pytest.approx(one, rel=5e-5, abs=1e-6)
        for name, value in first.items():
            torch.testing.assert_close(weights[name], value, rtol=0, atol=2e-4)
