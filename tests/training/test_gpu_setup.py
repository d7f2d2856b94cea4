"""What a run sets up for a GPU, on a machine that has none."""

from types import SimpleNamespace

import pytest
import torch

from tests import tiny
from visper.config import load_run
from visper.training.arguments import training_arguments
from visper.training.parallel.join import join_processes


@pytest.fixture
def gpu(monkeypatch):
    """A machine with one GPU, as far as torch is asked. Restores what is set for all of the process."""
    before, cudnn = torch.get_float32_matmul_precision(), torch.backends.cuda.cudnn_sdp_enabled()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("visper.training.parallel.join.PartialState", lambda **_: SimpleNamespace(num_processes=1))
    yield
    torch.set_float32_matmul_precision(before)
    torch.backends.cuda.enable_cudnn_sdp(cudnn)


def test_tf32_is_on_for_those_who_read_the_old_flag_too(gpu, monkeypatch, tmp_path, tiny_llm, tiny_encoder):
    """Torch 2.9's inductor reads it, and torch refuses that after the Trainer's ``tf32`` has set the new one."""
    given = []
    monkeypatch.setattr("visper.training.arguments.TrainingArguments", lambda **options: given.append(options))
    run = load_run(tiny.write_recipe(tmp_path, "ift", tiny_llm, tiny_encoder, max_steps=1))
    join_processes(run.launch)
    training_arguments(run, tmp_path, 1)
    assert given[0].get("tf32") is None
    assert torch.backends.cuda.matmul.allow_tf32
    assert torch.get_float32_matmul_precision() == "high"


def test_attention_is_not_planned_anew_for_every_length(gpu, tmp_path, tiny_llm, tiny_encoder):
    assert torch.backends.cuda.cudnn_sdp_enabled()
    join_processes(load_run(tiny.write_recipe(tmp_path, "ift", tiny_llm, tiny_encoder, max_steps=1)).launch)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()
