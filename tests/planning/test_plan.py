"""The plan: what it counts, what it says does not fit, and what it advises."""

import pytest
import torch
from typer.testing import CliRunner

from tests import tiny
from visper.cli import app
from visper.config import Engine, Run
from visper.planning.plan import Machine, Planner, cheapest_that_fits
from visper.planning.trace import StepShape


@pytest.fixture(scope="module")
def planner(tmp_path_factory, tiny_llm, tiny_encoder):
    """A tiny PT run on one 80 GB GPU."""
    rows = tiny.write_rows(tmp_path_factory.mktemp("rows"))
    run = Run.model_validate(
        {
            "name": "pt",
            "stage": "pt",
            "output": "x",
            "student": {"llm": str(tiny_llm), "encoder": str(tiny_encoder)},
            "distillation": tiny.distillation(),
            "data": {"sources": [{"json": str(rows / "rows.json"), "images": str(rows / "images")}]},
            "optimization": {"global_batch": 8, "micro_batch": 8, "lr": 1e-3, "precision": "float32"},
        }
    )
    return Planner(run, Machine(1, 80e9, peak=1e15))


def shape(planner, rows):
    return StepShape(rows, planner.rows.longest, planner.rows.most_supervised, rows)


def test_rows_are_measured_where_they_are(planner):
    assert planner.rows.count == 16 and planner.rows.pictures == 0.75 and "tokenized" in planner.rows.source
    assert planner.steps() == 2


def test_operations_of_a_step_are_what_torch_counts_of_its_matrices(planner):
    one, two = (planner.trace(shape(planner, rows), False, False).operations for rows in (1, 2))
    llm = next(part.total for part in planner.parts if part.part == "llm")
    assert two == pytest.approx(2 * one, rel=0.1)  # the queries are projected once a batch
    assert one > 4 * planner.rows.longest * 0.5 * llm  # forward and backward through a frozen LLM, tables left out


def test_recomputation_trades_memory_for_operations(planner):
    kept, half, recomputed = (planner.trace(shape(planner, 8), share, False) for share in (0.0, 0.5, 1.0))
    assert recomputed.kept < half.kept < kept.kept
    assert recomputed.operations > half.operations > kept.operations
    assert recomputed.peak < kept.peak


def test_traced_activations_are_those_a_real_step_holds(planner):
    """Against the tensors autograd saves in a real forward of an LLM of the same shape, weights left out."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from visper.planning.trace import _Alive, without_values

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    states = torch.randn(4, 50, 32)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        real = model.model(inputs_embeds=states, use_cache=False).last_hidden_state
    with torch.device("meta"):
        planned = LlamaForCausalLM(config)
    with without_values(planned):
        held = {t.untyped_storage()._cdata for t in (*planned.parameters(), *planned.buffers())}
        with _Alive(held) as alive:
            out = planned.model(inputs_embeds=torch.empty(4, 50, 32), use_cache=False).last_hidden_state
            assert out.shape == real.shape
    assert alive.now == pytest.approx(sum(saved.values()), rel=0.15)  # 11 % seen: states alive that nothing saves


def test_every_engine_has_a_figure_and_sharding_lowers_it(planner):
    alone = planner.machine
    found = {}
    for engine in Engine:
        planner.machine = Machine(8, 80e9, engine, 1e15)
        found[engine] = planner.memory(planner.choice).parts
    planner.machine = alone
    whole = found.pop(Engine.DDP)
    assert {parts["optimizer"] for parts in found.values()} == {whole["optimizer"] / 8}
    assert found[Engine.ZERO2]["weights"] == whole["weights"]
    assert found[Engine.ZERO3]["weights"] == found[Engine.FSDP]["weights"] == whole["weights"] / 8


def test_the_cheapest_change_that_fits_is_found(planner):
    full = planner.memory(planner.choice).total
    whole = planner.machine
    planner.machine = Machine(1, full / 0.95 * 0.999, peak=1e15)
    choice, memory, words = cheapest_that_fits(planner)
    assert memory.total < full and choice.micro_batch == 4 and "micro_batch=4" in words
    planner.machine = Machine(1, 1e6, peak=1e15)
    assert cheapest_that_fits(planner) is None
    planner.machine = whole


@pytest.mark.slow
def test_a_published_run_is_planned_without_its_weights():
    shown = CliRunner().invoke(app, ["plan", "phi3-mini-vit-l/pt", "--gpus", "8", "--hourly-price", "2"]).output
    for said in ("3,821,079,552", "teachers", "GPU hours", "cost", "targets, if stored"):
        assert said in shown, shown
