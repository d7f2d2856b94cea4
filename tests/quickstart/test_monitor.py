"""Predictions that are saved during PT, which the report draws."""

import pytest
import torch
from PIL import Image

from tests import tiny
from visper.config import Run, load_run
from visper.quickstart.monitor import PredictionMonitor, read_predictions
from visper.training import run_stage


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_predictions_are_saved_before_and_after_chosen_steps(precision, tmp_path, tiny_llm, tiny_encoder):
    recipe = tiny.write_recipe(tmp_path, "pt", tiny_llm, tiny_encoder, max_steps=3)
    settings = load_run(recipe, [f"optimization.precision={precision}"]).model_dump(mode="json")
    run = Run.model_validate({**settings, "distillation": tiny.distillation()})
    images = [Image.new("RGB", (20, 12), color) for color in ("red", "blue")]
    run_stage(run, callbacks=[PredictionMonitor(tmp_path / "monitored", images, [0, 2])])
    found = read_predictions(tmp_path / "monitored")
    assert found.keys() == {0, 2}
    for values in found.values():
        assert values and all(len(value) == 2 and torch.isfinite(value).all() for value in values.values())
