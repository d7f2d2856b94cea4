"""A step traced with a few equal layers says of all of them what tracing all of them says."""

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from tests import tiny
from tests.planning.test_plan import tiny_run, with_optimization
from visper.planning import fake_run
from visper.planning.fewer_layers import FewLayers, layers_to_trace
from visper.planning.memory import Machine
from visper.planning.plan import Plan

LAYERS = 14
TASKS = tiny.distillation()
for name, layers in (("depth", [5, 8]), ("seg", [8, 14]), ("gen", [6])):
    TASKS["tasks"][name]["layers"] = layers
RUNS = {
    "pt": {"stage": "pt", "distillation": TASKS},
    "ift": {"stage": "ift", "distillation": None},
    "ift with targets": {"stage": "ift", "distillation": TASKS},
    "low-rank updates": {"stage": "ift", "distillation": None, "lora": {"rank": 4}},
    "frozen": {"stage": "pt", "distillation": None},
}


@pytest.fixture(scope="module")
def deep_llm(tmp_path_factory):
    return tiny.save_llm(tmp_path_factory.mktemp("deep"), layers=LAYERS)


def found(run, accumulates):
    fit = Plan(run, Machine(1, None))
    held = [fit.model.activations(fit.rows, 8, share, accumulates) for share in (0.0, 1.0)]
    return held, (fit.model.row_flops(fit.rows), fit.model.recomputed_flops(fit.rows)), len(fit.model._kept)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "accumulates", "precision"),
    [
        ("pt", False, "bfloat16"),
        ("ift", False, "float32"),
        ("ift", True, "bfloat16"),
        ("ift with targets", False, "bfloat16"),
        ("low-rank updates", True, "float32"),
        ("frozen", False, "bfloat16"),
    ],
)
def test_a_few_layers_say_what_all_say(kind, accumulates, precision, tmp_path, deep_llm, tiny_encoder, monkeypatch):
    run = with_optimization(tiny_run(tmp_path, deep_llm, tiny_encoder, **RUNS[kind]), precision=precision)
    few, few_flops, traced = found(run, accumulates)
    monkeypatch.setattr(fake_run, "layers_to_trace", lambda layers, tapped: list(range(len(layers))))
    every, flops, _ = found(run, accumulates)
    assert traced < LAYERS and few_flops == flops
    assert few == every


@pytest.mark.slow
def test_packed_rows_are_traced_with_a_few_layers_too(tmp_path, deep_llm, tiny_encoder, monkeypatch):
    run = tiny_run(tmp_path, deep_llm, tiny_encoder, stage="ift", distillation=None)
    run = with_optimization(run, packing=True)
    few = found(run, False)
    monkeypatch.setattr(fake_run, "layers_to_trace", lambda layers, tapped: list(range(len(layers))))
    assert few[:2] == found(run, False)[:2] and few[2] < LAYERS


def test_the_ends_and_tapped_layers_are_traced():
    with torch.device("meta"):
        sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
        layers = LlamaForCausalLM(LlamaConfig(num_hidden_layers=LAYERS, **sizes)).model.layers
        mixed = Gemma3ForCausalLM(Gemma3TextConfig(num_hidden_layers=LAYERS, **sizes)).model.layers
    assert layers_to_trace(layers, (0, 6, 14)) == [0, 1, 2, 5, 11, 12, 13]
    everything = list(range(LAYERS))
    assert layers_to_trace(layers, (2,)) == everything  # tapped where the growth is read
    assert layers_to_trace(layers[:8], ()) == everything[:8]  # too few would be left out
    assert layers_to_trace(mixed, ()) == everything  # some attend to near tokens only
    layers[7].requires_grad_(False)
    assert layers_to_trace(layers, ()) == everything


@pytest.mark.slow
def test_layers_that_hold_unlike_amounts_are_all_traced(tmp_path, deep_llm, tiny_encoder, monkeypatch):
    run = tiny_run(tmp_path, deep_llm, tiny_encoder, stage="ift", distillation=None)
    expected = found(run, False)[0]
    monkeypatch.setattr(FewLayers, "most", lambda self: None)
    assert found(run, False)[0] == expected
