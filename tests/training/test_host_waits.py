"""A step makes the host wait for its GPU once, whatever it trains; counted on a CPU by ``benchmarks/host_waits.py``."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from tests import tiny
from visper.config import Run
from visper.target_store.build import build_targets
from visper.training import run_stage

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from host_waits import HostWaits

ACCUMULATED = {"global_batch": 8, "micro_batch": 2}
STEADY, LAST = 2, 4
"""Steps after which is counted, and which ends it."""


class Steady(TrainerCallback):
    """Keeps what was counted from the third step on, checkpoints left out."""

    def __init__(self, waits):
        self.waits, self.kept = waits, {}

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == STEADY:
            self.waits.places.clear()

    def on_step_end(self, args, state, control, **kwargs):
        self.kept = dict(self.waits.places)


def settings_of(folder, stage, llm, encoder, **optimization):
    rows = tiny.write_rows(folder / "rows", images=28, text_rows=4)
    return {
        "name": stage,
        "stage": stage,
        "output": str(folder / stage),
        "student": {"llm": str(llm), "encoder": str(encoder)},
        # A worker collates: what happens in it makes nobody wait.
        "data": {"sources": [{"json": str(rows / "rows.json"), "images": str(rows / "images")}], "workers": 1},
        "optimization": {"lr": 1e-3, "max_steps": LAST, "precision": "float32", **ACCUMULATED, **optimization},
        "logging": {"every": 100},
        **({"distillation": tiny.distillation()} if stage == "pt" else {}),
    }


def waits_of(settings):
    """Waits by place in the last two steps."""
    waits = HostWaits()
    steady = Steady(waits)
    with waits.counted():
        run_stage(Run.model_validate(settings), callbacks=[steady])
    return steady.kept


def assert_one_a_step(found):
    assert sum(found.values()) == LAST - STEADY, found
    assert all(place.startswith("monitor.py") for place in found), found


@pytest.mark.parametrize(
    ("stage", "optimization"),
    [
        ("pt", {}),
        pytest.param("pt", {"gradient_checkpointing": 0.5}, marks=pytest.mark.slow),
        pytest.param("vpt", {}, marks=pytest.mark.slow),
        ("ift", {}),
        pytest.param("ift", {"packing": True}, marks=pytest.mark.slow),
        pytest.param("ift", {"packing": True, "attention": "eager"}, marks=pytest.mark.slow),
    ],
)
def test_a_step_waits_once(stage, optimization, tmp_path, tiny_llm, tiny_encoder):
    found = waits_of(settings_of(tmp_path, stage, tiny_llm, tiny_encoder, **optimization))
    if "attention" in optimization:  # for an eager mask, older versions of transformers (5.17) copy a constant
        found = {place: count for place, count in found.items() if not place.startswith("masking_utils.py")}
    assert_one_a_step(found)


def test_joined_conversations_wait_no_more(tmp_path, tiny_llm, tiny_encoder):
    settings = settings_of(tmp_path, "ift", tiny_llm, tiny_encoder, packing=True)
    settings["data"]["join_conversations"] = True
    assert_one_a_step(waits_of(settings))


@pytest.mark.slow
def test_stored_targets_wait_no_more(tmp_path, tiny_llm, tiny_encoder):
    settings = settings_of(tmp_path, "pt", tiny_llm, tiny_encoder)
    build_targets(Run.model_validate(settings), tmp_path / "targets")
    settings["distillation"]["targets"] = str(tmp_path / "targets")
    assert_one_a_step(waits_of(settings))


def test_heads_at_image_tokens_wait_no_more(tmp_path, tiny_llm, tiny_encoder):
    settings = settings_of(tmp_path, "pt", tiny_llm, tiny_encoder)
    task = {"at": "image_tokens", "head": {"kind": "linear"}, "layers": [2]}
    settings["distillation"]["tasks"] = {
        "colors": {**task, "target": {"kind": "tests.tiny:PooledColors", "model": "colors"}},
        "own": {**task, "target": {"kind": "encoder"}, "loss": {"mse": 1.0}},
    }
    assert_one_a_step(waits_of(settings))


@pytest.mark.parametrize(
    ("operation", "waits"),
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: bool(x.any()), 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: x[x > 0], 1),
        (lambda x: x.tolist(), 1),
        (lambda x: x.masked_select(x > 0), 1),
        (lambda x: x.unique(), 1),
        (lambda x: x.repeat_interleave(torch.ones_like(x)), 1),
        (lambda x: x.repeat_interleave(torch.ones_like(x), output_size=3), 0),
        (lambda x: torch.equal(x, x), 1),
        (lambda x: x.cpu(), 1),
        (lambda x: torch.tensor([1], device=x.device), 1),
        (lambda x: x[torch.tensor([0])] + x.clamp(min=1), 0),
        (lambda x: torch.zeros(3).index_copy(0, x, torch.ones(3)), 0),
    ],
)
def test_what_waits_is_counted(operation, waits):
    counter = HostWaits()
    values = torch.tensor([0, 1, 2])
    with counter.counted():
        operation(values)
    assert sum(counter.places.values()) == waits, counter.places


def test_the_gradient_of_masked_scatter_waits():
    counter, source = HostWaits(), torch.ones(2, requires_grad=True)
    mask = torch.tensor([True, False, True])
    with counter.counted():
        torch.zeros(3).masked_scatter(mask, source).sum().backward()
    assert counter.places == {"masked_scatter_backward": 1}
