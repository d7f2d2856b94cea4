"""The plan: what it counts, what it says does not fit, and what it advises."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from tests import tiny
from visper.cli import app
from visper.common.errors import ConfigError
from visper.config import Engine, Geometry, Run
from visper.config import Student as StudentConfig
from visper.distillation.teachers.tasks import planned_specs
from visper.model import build_student, save_student
from visper.planning.fake_run import FakeRun, fake_batch
from visper.planning.fake_step import KnownPositions, LiveBytes, fake_parameters
from visper.planning.memory import Machine
from visper.planning.plan import Plan
from visper.planning.row_statistics import RowLength
from visper.training.flops import FlopMeter


class LoadedColors(tiny.PooledColors):
    """A teacher whose weights are loaded, as ``from_pretrained`` does: not without values."""

    def __init__(self, model):
        super().__init__(model)
        assert torch.empty(0).device.type == "cpu"


def tiny_run(folder, llm, encoder, **changes):
    """A tiny PT run on 16 rows, 12 of them with an image."""
    rows = tiny.write_rows(folder)
    settings = {
        "name": "pt",
        "stage": "pt",
        "output": "x",
        "student": {"llm": str(llm), "encoder": str(encoder)},
        "distillation": tiny.distillation(),
        "data": {"sources": [{"json": str(rows / "rows.json"), "images": str(rows / "images")}]},
        "optimization": {"global_batch": 8, "micro_batch": 8, "lr": 1e-3, "precision": "float32"},
    }
    return Run.model_validate(settings | changes)


@pytest.fixture
def run(tmp_path, tiny_llm, tiny_encoder):
    return tiny_run(tmp_path, tiny_llm, tiny_encoder)


def with_optimization(run, **changes):
    return run.model_copy(update={"optimization": run.optimization.model_copy(update=changes)})


def test_rows_are_measured_where_they_are(run):
    found = Plan(run, Machine(1, 80e9, peak=1e15))
    assert found.rows.count == 16 and found.rows.images == 0.75 and "tokenized" in found.rows.source
    assert found.steps == 2 and found.fits and found.lever is None


@pytest.mark.parametrize(("changes", "steps"), [({}, 8), ({"max_steps": 3}, 3), ({"max_steps": 50}, 50)])
def test_steps_are_those_of_training(run, changes, steps):
    """Each epoch's last batch is filled up: 16 rows are 3 batches of 6. ``max_steps`` replaces ``epochs``."""
    optimization = {"global_batch": 6, "micro_batch": 6, "epochs": 2.5, **changes}
    assert Plan(with_optimization(run, **optimization), Machine(0, None)).steps == steps


def test_what_training_would_refuse_is_not_planned(run):
    with pytest.raises(ConfigError, match="not a multiple of micro_batch 8 x 2 processes"):
        Plan(run, Machine(2, 80e9))
    launch = run.launch.model_copy(update={"engine": Engine.FSDP, "replicas": 2})
    with pytest.raises(ConfigError, match=r"launch\.replicas is 2, which gives each copy of the model 1\.5"):
        Plan(with_optimization(run, micro_batch=1, global_batch=6).model_copy(update={"launch": launch}), Machine(3, 1))


def test_rows_longer_than_the_llms_positions_are_refused(run):
    with pytest.raises(ConfigError, match="4096 positions"):
        Plan(run.model_copy(update={"data": run.data.model_copy(update={"max_tokens": 5000})}), Machine(1, 80e9))


def test_model_flops_of_two_rows_are_twice_those_of_one(run):
    model, row, counted = FakeRun(run, run, planned_specs(run.distillation)), RowLength(72, 17, 1), []
    for rows in (1, 2):
        batch, sizes = fake_batch([row] * rows, model.student, model.model, model.run, model.fake)
        meter = FlopMeter()
        with KnownPositions(model.fake), meter.watch(model.model, batch["input_ids"].numel(), sizes):
            model.model(**batch)
        counted.append(meter.costs.flops(sizes.tokens, sizes.pairs, sizes.supervised, sizes.image_tokens))
    assert counted[1] == pytest.approx(2 * counted[0], rel=0.1)  # the queries are projected once a batch
    llm = next(part.total for part in model.parts if part.part == "llm")
    assert counted[0] > 4 * row.tokens * 0.5 * llm  # forward and backward through a frozen LLM, tables left out


def test_traced_activations_are_those_that_autograd_saves():
    """Of a real forward pass of an LLM of the same shape, weights left out."""
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

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        real = model.model(inputs_embeds=torch.randn(4, 50, 32), use_cache=False).last_hidden_state
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.device("meta"):
        planned = LlamaForCausalLM(config)
    fake_parameters(planned, fake)
    with LiveBytes(fake, [*planned.parameters(), *planned.buffers()]) as live:
        with fake:
            states = torch.empty(4, 50, 32)
        out = planned.model(inputs_embeds=states, use_cache=False).last_hidden_state
    assert out.shape == real.shape
    assert live.now == pytest.approx(sum(saved.values()), rel=0.15)  # 11 % seen: states alive that nothing saves


@pytest.mark.slow
def test_recomputation_lowers_memory_and_leaves_model_flops(run):
    kept, recomputed = (
        Plan(with_optimization(run, gradient_checkpointing=share), Machine(1, 80e9)) for share in (0.0, 1.0)
    )
    assert recomputed.memory.parts["activations"] < kept.memory.parts["activations"]
    assert recomputed.row_flops == kept.row_flops


def test_a_teacher_of_ones_own_is_loaded_and_its_flops_are_counted(run):
    settings = tiny.distillation()["tasks"]["depth"]
    settings["target"] = {"kind": "tests.planning.test_plan:LoadedColors", "model": "colors"}
    distillation = run.distillation.model_validate({"tasks": {"depth": settings}})
    found = Plan(run.model_copy(update={"distillation": distillation}), Machine(1, 80e9))
    assert found.teacher_flops == 0.75 * 2 * 16 * 3 * 8  # three of four rows have an image: [16, 3] x [3, 8]


@pytest.mark.slow
def test_every_engine_has_a_figure_and_sharding_lowers_it(run):
    run, found = with_optimization(run, global_batch=64), {}
    for engine in Engine:
        launch = run.launch.model_copy(update={"engine": engine})
        found[engine] = Plan(run.model_copy(update={"launch": launch}), Machine(8, 80e9)).memory.parts
    alone = found.pop(Engine.DDP)
    assert {parts["optimizer"] for parts in found.values()} == {alone["optimizer"] / 8}
    assert found[Engine.ZERO2]["weights"] == alone["weights"]
    assert found[Engine.ZERO3]["weights"] == found[Engine.FSDP]["weights"] == alone["weights"] / 8


@pytest.mark.slow
def test_the_first_change_that_fits_is_found(run):
    run = with_optimization(run, gradient_checkpointing=1.0)
    full = Plan(run, Machine(1, 80e9)).memory.total
    found = Plan(run, Machine(1, full / 0.95 * 0.999))
    assert not found.fits and found.lever is not None and found.lever.memory.total < full
    # By hand: half a micro-batch is the least slowdown of all changes, and frees 0.9 MB, where 0.7 is asked for.
    assert found.lever.settings.micro_batch == 4 and found.lever.changes == "optimization.micro_batch=4"
    nothing = Plan(run, Machine(1, 1e6))
    assert not nothing.fits and nothing.lever is None


def test_a_run_from_a_plain_llava_folder_is_planned(tmp_path, tiny_llm, tiny_encoder):
    config = StudentConfig(llm=str(tiny_llm), encoder=str(tiny_encoder))
    save_student(build_student(config, Geometry.SQUASH), tmp_path / "llava")
    run = tiny_run(
        tmp_path,
        tiny_llm,
        tiny_encoder,
        stage="ift",
        student=None,
        distillation=None,
        start_from=str(tmp_path / "llava"),
    )
    found = Plan(run, Machine(1, 80e9))
    assert "tokenized" in found.rows.source and found.row_flops > 0


def test_an_llm_stored_in_half_precision_is_planned_as_training_reads_it(run, tiny_llm, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(tiny_llm, half)
    LlamaForCausalLM.from_pretrained(tiny_llm).bfloat16().save_pretrained(half)
    stored = run.model_copy(update={"student": run.student.model_copy(update={"llm": str(half)})})
    one, other = (Plan(each, Machine(1, 80e9)).memory for each in (run, stored))
    assert one == other


def test_packed_rows_hold_less_than_padded_ones(tmp_path, tiny_llm, tiny_encoder):
    padded = tiny_run(tmp_path, tiny_llm, tiny_encoder, distillation=None)
    packed = with_optimization(padded, packing=True)
    held = [Plan(each, Machine(1, 80e9)).memory.parts["activations"] for each in (padded, packed)]
    assert held[1] < held[0]


@pytest.mark.slow
def test_a_published_run_is_planned_without_its_weights():
    shown = CliRunner().invoke(app, ["plan", "phi3-mini-vit-l/pt", "--gpus", "8", "--hourly-price", "2"]).output
    for said in ("3,821,079,552", "teachers", "GPU hours", "cost", "targets, if stored"):
        assert said in shown, shown


def test_joined_rows_need_fewer_operations(tmp_path, tiny_llm, tiny_encoder):
    apart = tiny_run(tmp_path, tiny_llm, tiny_encoder, distillation=None)
    (source,) = apart.data.sources
    rows = json.loads(Path(source.json_file).read_text())
    for number, row in enumerate(row for row in rows if "image" in row):
        row["image"] = f"{number // 2}.png"
    Path(source.json_file).write_text(json.dumps(rows))
    joined = apart.model_copy(update={"data": apart.data.model_copy(update={"join_conversations": True})})
    one, other = Plan(apart, Machine(1, 80e9)), Plan(joined, Machine(1, 80e9))
    images = sum("image" in row for row in rows)
    assert f"{images} of {len(rows)} show an image, in joined micro-batches {images // 2} are" in other.rows.source
    assert other.row_flops < one.row_flops and other.steps == one.steps
    packed = Plan(with_optimization(apart, packing=True), Machine(1, 80e9))  # the same rows, each with its image
    assert other.memory.parts["activations"] < packed.memory.parts["activations"]


@pytest.mark.parametrize(("stage", "packing"), [("pt", False), ("ift", True)])
def test_rows_of_several_images_are_counted_and_planned(stage, packing, tmp_path, tiny_llm, tiny_encoder):
    rows = tiny.write_several(tmp_path / "several")
    data = {"sources": [{"json": str(rows / "rows.json"), "images": str(rows / "images")}]}
    changes = {"stage": stage, "data": data, "distillation": tiny.distillation() if stage == "pt" else None}
    run = tiny_run(tmp_path / "one", tiny_llm, tiny_encoder, **changes)
    found = Plan(with_optimization(run, packing=packing), Machine(1, 80e9, peak=1e15))
    assert found.rows.images == 1.5 and found.rows.longest.images == 3
    assert sorted({row.images for row in found.rows.sample}) == [0, 1, 2, 3]
    assert [row.images for row in found.rows.average_micro_batch(4)] == [2, 2, 1, 1]
    assert [row.images for row in found.rows.largest_micro_batch(4, packed=False)] == [3] * 4


@pytest.mark.parametrize("target", ["encoder", "projector"])
def test_the_students_own_targets_are_planned_without_a_teacher(target, tmp_path, tiny_llm, tiny_encoder):
    task = {"target": {"kind": target}, "at": "image_tokens", "layers": [1, 2], "loss": {"cosine": 1.0}}
    tasks = {"tasks": {"own": task | {"head": {"kind": "mlp", "width": 16}}}}
    plain = {"llm": str(tiny_llm), "encoder": str(tiny_encoder), "task_tokens": None}
    changes = {"stage": "ift", "student": plain}
    with_own = tiny_run(tmp_path / "own", tiny_llm, tiny_encoder, distillation=tasks, **changes)
    without = tiny_run(tmp_path / "none", tiny_llm, tiny_encoder, distillation=None, **changes)
    one, other = (Plan(run, Machine(1, 80e9)) for run in (with_own, without))
    assert one.teacher_flops == 0 and one.row_flops > other.row_flops
    assert {part.part: part.total for part in one.parts}["predictors"] > 0
    assert not any("targets" in name for name in one.disk)


@pytest.mark.slow
def test_what_is_sent_and_held_by_hand(run):
    def planned(**launch):
        return Plan(run.model_copy(update={"launch": run.launch.model_copy(update=launch)}), Machine(4, 80e9))

    run = with_optimization(run, micro_batch=1)  # two micro-batches a step
    ddp, fsdp = planned(), planned(engine=Engine.FSDP)
    once = planned(engine=Engine.FSDP, reduce_once=True)
    copies = planned(engine=Engine.FSDP, replicas=2)
    gradients = 4 * sum(part.trainable for part in ddp.parts)
    assert ddp.sent == 2 * gradients * 3 / 4
    assert fsdp.sent - once.sent == gradients * 3 / 4  # one reduction less
    weights = (fsdp.sent - 2 * gradients * 3 / 4) / (2 * 3 / 4)
    assert weights > 4 * sum(part.total for part in ddp.parts)
    assert copies.sent == pytest.approx(2 * (weights + gradients) / 2 + 2 * gradients / 2 / 2)
    waits = "gradients of the step"
    assert waits not in fsdp.memory.parts
    assert (once.memory.parts[waits], copies.memory.parts[waits]) == (gradients, gradients / 2)
    assert copies.memory.parts["optimizer"] == 2 * fsdp.memory.parts["optimizer"]
