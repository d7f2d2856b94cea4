"""The Trainer's arguments on machines that are not there."""

import pytest
import torch

from tests import tiny
from visper.config import load_run
from visper.training.arguments import training_arguments


@pytest.mark.parametrize("available", [True, False])
def test_tf32_is_asked_for_where_the_gpu_has_it(available, monkeypatch, tmp_path, tiny_llm, tiny_encoder):
    """Not on NVIDIA GPUs before Ampere, nor on AMD's."""
    run = load_run(tiny.write_recipe(tmp_path, "ift", tiny_llm, tiny_encoder, max_steps=1))
    given = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("visper.training.arguments.is_torch_tf32_available", lambda: available)
    monkeypatch.setattr("visper.training.arguments.TrainingArguments", lambda **options: given.append(options))
    training_arguments(run, tmp_path, 1)
    assert given[0]["tf32"] == (True if available else None)
