"""Compiled layers and predictors train as others do, in one graph each, and few of them.

The backend ``aot_eager`` traces and then calls the same kernels, so losses are bitwise equal; inductor makes kernels of
its own, and needs a compiler.
"""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny
from tests.logs import computed
from tests.training.test_module import batch_of, gradients, model  # noqa: F401
from visper.common.compat import around_operations
from visper.common.errors import ConfigError
from visper.config import Geometry, Run
from visper.config import Student as StudentConfig
from visper.data.collator import Collator, Sample
from visper.data.packing import PackingCollator
from visper.model import build_student
from visper.training import TrainingModel, apply_stage, run_stage
from visper.training.attention import separate_samples
from visper.training.compilation import compile_parts, require_compiler
from visper.training.module import FORWARD_KEYS
from visper.training.stages import TASK_TOKEN_PARTS


class Graphs:
    """A backend that computes as before and counts the graphs that it is given."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph.forward


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()


BATCHES = [(2, 1), (3, 0), (1, 0), (0, 2), (4, 3), (1, 1), (2, 2)]
"""Images and text rows of each."""


@pytest.mark.slow
@pytest.mark.parametrize("recomputed", [0.0, 0.5])
def test_losses_and_gradients_are_those_of_layers_as_they_are(model, recomputed):  # noqa: F811
    batches = [batch_of(model, *rows) for rows in BATCHES]
    if recomputed:
        model.recompute_activations(recomputed)
    model.train()
    expected = [(model(**batch)["loss"], gradients(model, batch)) for batch in batches]
    names = list(model.state_dict())
    compile_parts(model, "aot_eager")
    for batch, (loss, by_name) in zip(batches, expected, strict=True):
        assert model(**batch)["loss"] == loss
        found = gradients(model, batch)
        assert found.keys() == by_name.keys()
        for name, gradient in by_name.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-8)
    assert list(model.state_dict()) == names


@pytest.mark.slow
def test_a_few_graphs_serve_all_layers_and_batches_of_any_shape(model):  # noqa: F811
    graphs = Graphs()
    compile_parts(model, graphs)
    model.train()
    for rows in BATCHES:
        gradients(model, batch_of(model, *rows))
    seen = graphs.count
    assert 0 < seen <= 4 + 4, "more than the layers' and the head's"
    for rows in [(5, 1), (0, 4), (1, 3), (6, 0)]:
        gradients(model, batch_of(model, *rows))
    assert graphs.count == seen


def test_evaluation_and_answers_compile_nothing(model):  # noqa: F811
    graphs = Graphs()
    compile_parts(model, graphs)
    model.eval()
    model(**batch_of(model))
    model.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False)
    assert graphs.count == 0


def test_a_pass_whose_flops_are_counted_runs_as_it_is(model):  # noqa: F811
    graphs, batch = Graphs(), batch_of(model)
    model.train()
    expected = model(**batch)["loss"]
    compile_parts(model, graphs)
    with around_operations(lambda operation, args, kwargs: operation(*args, **kwargs)):
        assert model(**batch)["loss"] == expected
    assert graphs.count == 0
    model(**batch)
    assert graphs.count > 0


@pytest.mark.slow
def test_a_pass_whose_flops_are_counted_recomputes_its_layers_as_they_ran(model):  # noqa: F811
    batches = [batch_of(model, *rows) for rows in BATCHES[:2]]
    model.recompute_activations()
    model.train()
    expected = [gradients(model, batch) for batch in batches]
    graphs = Graphs()
    compile_parts(model, graphs)
    counted, later = batches
    model.zero_grad(set_to_none=True)
    with around_operations(lambda operation, args, kwargs: operation(*args, **kwargs)):
        loss = model(**counted)["loss"]
    loss.backward()  # outside of the count, as in training
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert graphs.count == 0
    torch.testing.assert_close(found, expected[0], rtol=0, atol=0)
    torch.testing.assert_close(gradients(model, later), expected[1], rtol=1e-5, atol=1e-8)
    assert graphs.count > 0


def test_a_layer_that_breaks_the_graph_is_an_error(model):  # noqa: F811
    layer = model.student.get_decoder().layers[0]
    own = layer.mlp.forward
    layer.mlp.forward = lambda states: own(states) * (1 + int(states.sum() > 1e9))
    compile_parts(model, "aot_eager")
    with pytest.raises(
        ConfigError, match=r"DecoderLayer cannot be compiled as one graph: set optimization.compile=null"
    ):
        model.train()(**batch_of(model))


def packed_model(tiny_llm, tiny_encoder, attention):
    """A student for IFT whose LLM attends so, and rows of several lengths for it."""
    student = build_student(StudentConfig(llm=str(tiny_llm), encoder=str(tiny_encoder)), Geometry.SQUASH)
    student.model.get_decoder().set_attn_implementation(attention)
    separate_samples(student.model.get_decoder())
    built = TrainingModel(student)
    apply_stage(built, "ift", lacks=TASK_TOKEN_PARTS)
    return built.train()


def packed_batches(built):
    """Packed rows of two, three and five samples."""
    generator = torch.Generator().manual_seed(3)
    collate = built.with_positions(PackingCollator(Collator(0)))
    for lengths in ((9, 14), (21, 4, 8), (6, 30), (5, 5, 5, 12, 7), (40, 3)):
        ids = [torch.randint(3, 200, (length,), generator=generator).tolist() for length in lengths]
        made = collate([Sample(str(at), row, [-100, *row[1:]]) for at, row in enumerate(ids)])
        yield {key: made[key] for key in FORWARD_KEYS if key in made} | {"num_tokens": sum(lengths)}


def test_packed_rows_under_eager_attention_train_as_without(tiny_llm, tiny_encoder):
    built, graphs = packed_model(tiny_llm, tiny_encoder, "eager"), Graphs()
    batches = list(packed_batches(built))
    expected = [(built(**batch)["loss"], gradients(built, batch)) for batch in batches]
    compile_parts(built, graphs)
    for batch, (loss, by_name) in zip(batches, expected, strict=True):
        assert built(**batch)["loss"] == loss
        for name, gradient in gradients(built, batch).items():
            torch.testing.assert_close(gradient, by_name[name], rtol=1e-5, atol=1e-8)
    assert graphs.count == 1


@pytest.mark.slow
def test_packed_rows_under_flex_attention_are_one_graph_for_all_layers(tiny_llm, tiny_encoder):
    """Without gradients: flex attention has no backward pass on a CPU."""
    built, graphs = packed_model(tiny_llm, tiny_encoder, "flex_attention"), Graphs()
    compile_parts(built, graphs)
    with torch.no_grad():
        for batch in packed_batches(built):
            built(**batch)
    assert graphs.count == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler for the CPU")
def test_inductors_kernels_give_the_same_loss(model):  # noqa: F811
    """Losses seen apart: 0; the kernels of a CPU sum in another order."""
    batch = batch_of(model)
    model.train()
    loss, expected = model(**batch)["loss"], gradients(model, batch)
    compile_parts(model, "inductor")
    torch.testing.assert_close(model(**batch)["loss"], loss, rtol=1e-6, atol=0)
    for name, gradient in gradients(model, batch).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_flex_attention_trains_packed_rows_as_sdpa_does_on_a_gpu(tmp_path, tiny_encoder):
    """In float32; what is seen apart has not been measured. Flex attention's kernels need heads of 16 and more."""
    losses, llm = [], tiny.save_llm(tmp_path, width=64)
    for attention, backend in (("sdpa", None), ("flex_attention", "inductor")):
        built = packed_model(llm, tiny_encoder, attention).cuda()
        if backend is not None:
            compile_parts(built, backend)
        for batch in packed_batches(built):
            moved = {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
            loss = built(**moved)["loss"]
            loss.backward()
            losses.append(loss.detach())
        losses.append(built.student.get_input_embeddings().weight.grad.norm())
    one, other = torch.stack(losses).chunk(2)
    torch.testing.assert_close(other, one, rtol=1e-3, atol=0)


@pytest.fixture(scope="module")
def settings(tmp_path_factory, tiny_llm, tiny_encoder):
    """``settings(stage, name, **optimization)``: a run of three steps."""
    folder = tmp_path_factory.mktemp("compiled")
    rows = tiny.write_rows(folder / "rows", images=8, text_rows=4)

    def build(stage, name, lora=None, **optimization):
        rates = {"lr": 1e-3, "global_batch": 4, "micro_batch": 2, "max_steps": 3, "precision": "float32"}
        return Run.model_validate(
            {
                "name": name,
                "stage": stage,
                "output": str(folder / name),
                "student": {"llm": str(tiny_llm), "encoder": str(tiny_encoder)},
                "data": {"sources": [{"json": str(rows / "rows.json"), "images": str(rows / "images")}], "workers": 0},
                "optimization": rates | optimization,
                "logging": {"every": 1},
                "lora": lora,
                **({"distillation": tiny.distillation()} if stage == "pt" else {}),
            }
        )

    return build


LORA = {"rank": 4, "alpha": 8}


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "changes"), [("pt", {"gradient_checkpointing": 0.5}), ("ift", {"lora": LORA})])
def test_a_run_that_compiles_logs_and_saves_what_one_without_does(settings, stage, changes):
    if "lora" in changes:
        pytest.importorskip("peft")
    plain, compiled = (
        settings(stage, f"{stage}-plain", **changes),
        settings(stage, f"{stage}-compiled", compile="aot_eager", **changes),
    )
    for run in (plain, compiled):
        run_stage(run)
    for found, entry in zip(computed(Path(compiled.output)), computed(Path(plain.output)), strict=True):
        assert found == pytest.approx(entry, rel=1e-6)  # the gradients' sums have another order, seen apart 1e-7
    one, other = (load_file(Path(run.output) / "model" / "model.safetensors") for run in (plain, compiled))
    assert one.keys() == other.keys()
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("optimization", "more", "reason"),
    [
        ({"packing": True}, {}, "packing under optimization.attention=None"),
        ({"packing": True, "attention": "sdpa"}, {}, "only under flex_attention or eager"),
        ({}, {"launch": {"engine": "zero3"}}, "launch.engine=zero3"),
        ({}, {"lora": {"quantize": "4bit"}}, "lora.quantize"),
        ({}, {"data": {"join_conversations": True}}, "data.join_conversations"),
    ],
)
def test_what_cannot_be_compiled_is_refused_before_anything_is_loaded(settings, optimization, more, reason):
    given = settings("ift", "refused", **optimization).model_dump()
    given["optimization"]["compile"] = "inductor"
    for key, value in more.items():
        given[key] = {**(given[key] or {}), **value}
    with pytest.raises(ValueError, match=reason):
        Run.model_validate(given)


def test_inductor_without_a_compiler_is_refused(settings, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    require_compiler(settings("pt", "traced", compile="aot_eager"))
    with pytest.raises(ConfigError, match="needs a C compiler"):
        require_compiler(settings("pt", "built", compile="inductor"))
