"""Every way to state an objective, through the training model and through stages."""

import itertools
import json
from io import StringIO
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import TrainerCallback

from tests import tiny
from visper.common.console import Console
from visper.common.errors import ConfigError
from visper.config import Distillation, Geometry, Optimization, Run, Stage
from visper.config import Student as StudentConfig
from visper.data.collator import Collator, Sample
from visper.data.packing import PackingCollator
from visper.distillation import Targets
from visper.distillation.heads import LinearHead, TokenHead
from visper.distillation.teachers.tasks import build_teachers, specs_of
from visper.evaluation.predictions import load_pre_trained
from visper.evaluation.visualize import SIDE, look
from visper.model import build_student
from visper.training import run_stage
from visper.training.assemble import build_training_model, choose_trainable, continue_objective, set_trainable
from visper.training.attention import separate_samples
from visper.training.checkpoint import trainable_state
from visper.training.module import FORWARD_KEYS
from visper.training.stages import count_parts

TEACHER = {"kind": "tests.tiny:PooledColors", "model": "colors", "width": 32}
HEADS = {
    "resampler": {"heads": 2, "head_width": 4},
    "mlp": {"depth": 2, "width": 16},
    "linear": {},
    "none": {},
}
LOSSES = ("smooth_l1", "mse", "cosine", "gram", "info_nce")
POSITIONS = ("task_tokens", "image_tokens", "projector")


def objective(at="image_tokens", head="linear", loss=None, target=None, **more):
    # 16 queries divide among 8 task tokens; a grid of 3 x 3 is laid on the student's 4 x 4 tokens.
    target = target or {**TEACHER, "grid": 4 if at == "task_tokens" else 3}
    task = {
        "target": target,
        "at": at,
        "head": {"kind": head, **HEADS.get(head, {})},
        "loss": loss or {"cosine": 1.0},
        **more,
    }
    if at != "projector":
        task.setdefault("layers", [2, 4])
    return Distillation.model_validate({"tasks": {"depth": task}})


@pytest.fixture
def student(tiny_llm, tiny_encoder):
    torch.manual_seed(0)
    return build_student(StudentConfig(llm=str(tiny_llm), encoder=str(tiny_encoder)), Geometry.SQUASH)


@pytest.fixture
def plain(tiny_llm, tiny_encoder):
    torch.manual_seed(0)
    config = StudentConfig(llm=str(tiny_llm), encoder=str(tiny_encoder), task_tokens=None)
    return build_student(config, Geometry.SQUASH)


def model_of(student, distillation, stage="ift", **optimization):
    teachers = build_teachers(distillation, "float32", student.task_token_ids)
    model = build_training_model(student, Stage(stage), distillation, specs_of(teachers))
    settings = Optimization.model_validate({"global_batch": 4, "lr": 1e-3, **optimization})
    choose_trainable(model, Stage(stage), settings)
    return model.train()


def samples(model, images=(1, 0, 2, 1)):
    """Rows with that many images each, and text around them."""
    generator = torch.Generator().manual_seed(1)
    block = [model.image_token_id] * 16 + [token for ids in model.task_token_ids.values() for token in ids]
    found = []
    for number, count in enumerate(images):
        ids = torch.randint(1, 200, (3,), generator=generator).tolist()
        for _ in range(count):
            ids += [*block, *torch.randint(1, 200, (2 + number,), generator=generator).tolist()]
        labels = [-100] * (len(ids) - 2) + ids[-2:]
        pixels = torch.randn(count, 3, 16, 16, generator=generator) if count else None
        found.append(Sample(str(number), ids, labels, (16,) * count, pixels))
    return found


def batch_of(model, rows, packed=False, pool=None, own=slice(None)):
    made = (PackingCollator(Collator(0)) if packed else Collator(0))(rows)
    batch = {key: made[key] for key in FORWARD_KEYS if key in made}
    batch |= {"num_tokens": 8, "num_images": 4}
    if pool is not None:
        labels = torch.arange(len(pool))[own]
        batch["targets"] = {"depth": Targets(pool[own], pool, labels)}
    return batch


def pool_of(model, images=4):
    spec = model.objective.tasks["depth"].target
    return torch.randn(images, spec.tokens, spec.width, generator=torch.Generator().manual_seed(2))


def step(model, batch):
    model.zero_grad()
    found = model(**batch)
    found["loss"].backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name: float(value) for name, value in found.items()}, gradients


@pytest.mark.parametrize("stage", ["pt", "vpt", "ift"])
@pytest.mark.parametrize(("at", "head"), [*itertools.product(POSITIONS, HEADS), ("sequence", "resampler")])
def test_every_position_head_and_loss_trains_in_every_stage(student, at, head, stage):
    weights = dict.fromkeys(LOSSES, 1.0)
    model = model_of(student, objective(at, head, weights), stage)
    terms, gradients = step(model, batch_of(model, samples(model), pool=pool_of(model)))
    layers = (0,) if at == "projector" else (2, 4)
    names = [f"depth/{layer}/{kind}" for layer in layers for kind in LOSSES]
    assert [name for name in terms if name.startswith("depth")] == names
    assert all(0 < terms[name] < 100 for name in names)
    assert terms["loss"] == pytest.approx(terms["ntp"] + 0.5 * sum(terms[name] for name in names), rel=1e-5)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    heads = {name for name in trainable if name.startswith("objective.predictors")}
    assert bool(heads) == (head != "none")
    assert all(gradients[name].abs().max() > 0 for name in heads)
    assert gradients["student.model.multi_modal_projector.linear_1.weight"].abs().max() > 0
    assert any(name.startswith("student.model.language_model") for name in gradients) == (stage != "pt")
    assert ("task_tokens.queries.depth" in trainable) == (stage == "pt" or at == "task_tokens")


@pytest.mark.parametrize("target", ["encoder", "projector"])
@pytest.mark.parametrize("stage", ["pt", "ift"])
def test_the_students_own_features_are_targets_without_a_teacher(plain, target, stage):
    distillation = objective(target={"kind": target}, loss=dict.fromkeys(LOSSES[:-1], 1.0))
    model = model_of(plain, distillation, stage)
    assert build_teachers(distillation, "float32") == {}
    batch = batch_of(model, samples(model))
    terms, gradients = step(model, batch)
    assert all(terms[f"depth/{layer}/{kind}"] > 0 for layer in (2, 4) for kind in LOSSES[:-1])
    assert all(gradients[name].abs().max() > 0 for name in gradients if "predictors" in name)


def test_what_is_predicted_of_the_projector_is_its_output(plain):
    """With no head, at a layer that is the identity, the projector's output is predicted without an error."""
    model = model_of(plain, objective(target={"kind": "projector"}, head="none", loss={"mse": 1.0}, layers=[1]))
    with torch.no_grad():
        layer = plain.model.model.language_model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    assert step(model, batch_of(model, samples(model)))[0]["depth/1/mse"] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("at", "head"), [("task_tokens", "resampler"), ("image_tokens", "mlp"), ("projector", "linear")]
)
def test_packed_rows_and_micro_batches_give_the_terms_of_one_padded_batch(student, at, head):
    model = model_of(student, objective(at, head, {"cosine": 1.0, "gram": 1.0, "info_nce": 1.0}))
    separate_samples(model.student.get_decoder())
    rows, pool = samples(model), pool_of(model)
    terms, gradients = step(model, batch_of(model, rows, pool=pool))
    packed = step(model, batch_of(model, rows, packed=True, pool=pool))
    first = step(model, batch_of(model, rows[:2], pool=pool, own=slice(0, 1)))
    rest = step(model, batch_of(model, rows[2:], packed=True, pool=pool, own=slice(1, 4)))
    for name, value in terms.items():
        assert packed[0][name] == pytest.approx(value, rel=2e-5, abs=1e-6), name
        assert first[0][name] + rest[0][name] == pytest.approx(value, rel=2e-5, abs=1e-6), name
    for name, gradient in gradients.items():
        torch.testing.assert_close(packed[1][name], gradient, rtol=1e-3, atol=1e-5, msg=name)
        torch.testing.assert_close(first[1][name] + rest[1][name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_each_token_predicts_the_teacher_at_its_place(student):
    """Swapping the rows of the teacher's map changes the cosine of the student's rows alike."""
    model = model_of(student, objective(head="none", target={**TEACHER, "grid": 4}, layers=[2]))
    rows, pool = samples(model, (1,)), pool_of(model, 1)
    plain = step(model, batch_of(model, rows, pool=pool))[0]["depth/2/cosine"]
    flipped = pool.unflatten(1, (4, 4)).flip(1).flatten(1, 2)
    assert step(model, batch_of(model, rows, pool=flipped))[0]["depth/2/cosine"] != pytest.approx(plain, rel=1e-3)


def test_padding_around_an_image_predicts_nothing(student):
    model = model_of(student, objective(layers=[2]))
    rows, pool = samples(model, (1,)), pool_of(model, 1)
    places = torch.rand(16, 2)
    places[8:] = float("nan")
    batch = batch_of(model, rows, pool=pool) | {"image_places": places}
    states = {}
    model.objective.predictors["depth_2"].register_full_backward_hook(lambda *found: states.update(grad=found[1][0]))
    step(model, batch)
    assert states["grad"][0, 8:].abs().max() == 0 < states["grad"][0, :8].abs().min()


def test_one_head_may_serve_all_layers(student):
    distillation = objective(head="mlp")
    task = distillation.tasks["depth"]
    shared = distillation.model_copy(
        update={"tasks": {"depth": task.model_copy(update={"head": task.head.model_copy(update={"shared": True})})}}
    )
    model = model_of(student, shared)
    assert list(model.objective.predictors) == ["depth_shared"]
    assert step(model, batch_of(model, samples(model), pool=pool_of(model)))[0]["depth/4/cosine"] > 0


def test_a_frozen_head_stays_passes_gradient_on_and_is_kept_in_checkpoints(student):
    distillation = objective(head="mlp", layers=[4])
    task = distillation.tasks["depth"]
    frozen = task.model_copy(update={"head": task.head.model_copy(update={"frozen": True})})
    model = model_of(student, distillation.model_copy(update={"tasks": {"depth": frozen}}))
    names = [name for name, _ in model.named_parameters() if "predictors" in name]
    _, gradients = step(model, batch_of(model, samples(model), pool=pool_of(model)))
    assert names and not any(name in gradients for name in names)
    assert {count.part: count.trainable for count in count_parts(model)}["predictors"] == 0
    assert set(names) <= set(trainable_state(model))


def test_a_frozen_head_leaves_the_heads_of_a_task_of_similar_name(student):
    student.task_token_ids = {}
    tasks = {name: objective(head="mlp").tasks["depth"] for name in ("depth", "depth_metric")}
    tasks["depth"] = tasks["depth"].model_copy(update={"head": tasks["depth"].head.model_copy(update={"frozen": True})})
    model = model_of(student, Distillation(tasks=tasks))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad and "predictors" in name}
    assert {name.split(".")[2] for name in trainable} == {"depth_metric_2", "depth_metric_4"}


def test_the_weight_falls_to_zero_over_its_share_of_the_steps(student):
    model = model_of(student, objective(schedule={"end": 0.5}))
    batch = batch_of(model, samples(model), pool=pool_of(model))
    added = []
    for progress in (0.0, 0.25, 0.5, 0.9):
        terms, _ = step(model, batch | {"progress": progress})
        added.append((terms["loss"] - terms["ntp"]) / (terms["depth/2/cosine"] + terms["depth/4/cosine"]))
    assert added == pytest.approx([0.5, 0.25, 0.0, 0.0], abs=1e-6)


def test_parts_are_added_to_the_stages_table(student):
    model = model_of(student, objective(), "pt", train=["llm.layers.0", "projector"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "language_model" in name}
    assert trained and all("language_model.layers.0." in name for name in trained)
    with pytest.raises(ValueError, match=r"optimization\.train names 'lm', .*its parts are vision, projector, llm"):
        model_of(student, objective(), "pt", train=["lm"])
    everything = ["projector", "task_tokens", "predictors"]
    with pytest.raises(ConfigError, match=r"would train nothing: remove a part from optimization\.freeze"):
        model_of(student, objective(), "pt", freeze=everything)


@pytest.mark.parametrize(
    ("at", "stage", "freeze", "warned"),
    [
        ("projector", "pt", ["projector"], True),
        ("image_tokens", "pt", ["projector"], True),  # the task tokens that are trained come after the image
        ("task_tokens", "pt", ["projector"], False),
        ("image_tokens", "pt", [], False),
        ("projector", "ift", ["projector"], True),
        ("image_tokens", "ift", ["projector"], False),
        ("image_tokens", "pt", ["projector", "task_tokens"], False),  # a probe
    ],
)
def test_a_task_that_can_only_train_its_head_is_warned_of(student, at, stage, freeze, warned):
    settings, said = objective(at), StringIO()
    model = build_training_model(student, Stage(stage), settings, specs_of(build_teachers(settings, "float32")))
    optimization = Optimization(global_batch=4, lr=1e-3, precision="float32", freeze=freeze)
    set_trainable(model, Stage(stage), optimization, False, Console(file=said, width=500))
    text = f"warning     task 'depth' trains only its head: all that its states at {at} depend on is frozen"
    assert (text in said.getvalue()) == warned


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": "none", "target": {**TEACHER, "width": 7}}, "states of width 32 with a target of width 7"),
        ({"target": {**TEACHER, "grid": 1}}, "has no grid to map onto image tokens: set .*head.kind' to resampler"),
        ({"layers": [5]}, "the model has layers 1 to 4"),
    ],
)
def test_objectives_that_cannot_be_are_refused_before_the_first_step(student, changes, message):
    with pytest.raises(ConfigError, match=message):
        model_of(student, objective(**changes))


class OwnHead(LinearHead):
    def __init__(self, llm_width, target, bias=True):
        super().__init__(llm_width, target)


def test_a_wrong_option_for_a_head_of_ones_own_names_the_right_one(student):
    task = objective().tasks["depth"].model_dump()
    task["head"] = {"kind": "tests.training.test_objectives:OwnHead", "bais": False}
    with pytest.raises(ConfigError, match="has no option 'bais': did you mean 'bias'"):
        model_of(student, Distillation.model_validate({"tasks": {"depth": task}}))


def test_task_tokens_are_wanted_only_where_they_are_read(plain):
    with pytest.raises(ConfigError, match=r"no task tokens for \['depth'\].*image_tokens"):
        model_of(plain, objective("task_tokens"))
    assert model_of(plain, objective("image_tokens")).task_tokens is None


@pytest.fixture
def make(tiny_llm, tiny_encoder, tmp_path):
    rows = tiny.write_rows(tmp_path / "rows")

    def build(name, stage="ift", distillation=None, start=None, optimization=None, **changes):
        settings = {
            "name": name,
            "stage": stage,
            "output": str(tmp_path / name),
            "data": {"sources": [{"json": str(rows / "rows.json"), "images": str(rows / "images")}], "workers": 0},
            "optimization": {"global_batch": 4, "micro_batch": 2, "lr": 1e-3, "max_steps": 4, "precision": "float32"},
            "logging": {"every": 1, "save_every": 2},
            "distillation": None if distillation is None else distillation.model_dump(mode="json"),
            **changes,
        }
        settings["optimization"] |= optimization or {}
        if start is None:
            settings["student"] = {"llm": str(tiny_llm), "encoder": str(tiny_encoder), "task_tokens": None}
        else:
            settings["start_from"] = str(tmp_path / start)
        return Run.model_validate(settings)

    return build


def logs_of(run):
    return [json.loads(line) for line in (Path(run.output) / "log.jsonl").read_text().splitlines()]


def test_fine_tuning_of_a_plain_llava_is_supervised_with_lora_and_packing(make, tmp_path):
    run_stage(make("pt", "pt"))
    options = {"optimization": {"packing": True}, "lora": {"rank": 2, "alpha": 4}}
    run = make("ift", distillation=objective(head="mlp"), start="pt", **options)
    run_stage(run)
    logs = [log for log in logs_of(run) if "loss" in log]
    assert len(logs) == 4 and all(log["depth/2/cosine"] > 0 for log in logs)
    assert logs[-1]["depth/2/cosine"] < logs[0]["depth/2/cosine"]
    kept = load_file(tmp_path / "ift" / "distillation" / "weights.safetensors")
    assert {name.split(".")[2] for name in kept} == {"depth_2", "depth_4"}
    drawn = look(load_pre_trained(tmp_path / "ift"), Image.new("RGB", (20, 24), "red"))
    assert drawn.width > 3 * SIDE  # image, teacher, two layers


def test_the_projector_is_supervised_with_lora_and_a_head_for_all_layers_is_drawn(make, tmp_path):
    run_stage(make("pt", "pt"))
    lora, steps = {"rank": 2, "alpha": 4}, {"max_steps": 2}
    one = objective(head="mlp").tasks["depth"]
    one = one.model_copy(update={"head": one.head.model_copy(update={"shared": True})})
    tasks = objective("projector", "mlp").tasks | {"shared": one}
    run = make("ift", distillation=Distillation(tasks=tasks), start="pt", lora=lora, optimization=steps)
    run_stage(run)
    first, second = (log for log in logs_of(run) if "loss" in log)
    assert second["depth/0/cosine"] != first["depth/0/cosine"] > 0
    found = load_pre_trained(tmp_path / "ift")
    assert sorted(found.model.objective.predictors) == ["depth_0", "shared_shared"]
    assert look(found, Image.new("RGB", (20, 24), "red")).width > 3 * SIDE  # image, teacher, two layers


def test_an_image_that_rows_share_is_no_negative_of_itself(make, tmp_path):
    losses = {"info_nce": 1.0, "cosine": 1.0}
    run_stage(make("apart", distillation=objective(loss=losses), optimization={"max_steps": 1}))
    rows = tmp_path / "rows" / "rows.json"
    shared = [{**row, "image": "0.png"} if "image" in row else row for row in json.loads(rows.read_text())]
    rows.write_text(json.dumps(shared))
    run_stage(make("shared", distillation=objective(loss=losses), optimization={"max_steps": 1}))
    first, second = (logs_of(make(name))[0] for name in ("apart", "shared"))
    assert first["depth/2/info_nce"] > 0.1 and second["depth/2/info_nce"] == 0 < second["depth/2/cosine"]


def test_what_predicts_no_map_of_a_teacher_is_said_not_drawn(make, tmp_path):
    run_stage(make("own", distillation=objective(target={"kind": "encoder"}), optimization={"max_steps": 1}))
    found = load_pre_trained(tmp_path / "own")
    assert look(found, Image.new("RGB", (20, 24), "red")).width < 3 * SIDE


def test_heads_go_on_in_the_next_stage_where_target_and_head_are_the_same(make, tmp_path):
    run_stage(make("pt", "pt", objective(head="mlp")))
    same = make("same", distillation=objective(head="mlp"), start="pt", optimization={"lr": 1e-12, "max_steps": 1})
    other = make("other", distillation=objective(head="linear"), start="pt", optimization={"max_steps": 1})
    weights = []
    for run in (same, other):
        run_stage(run)
        weights.append(load_file(Path(run.output) / "distillation" / "weights.safetensors"))
    before = load_file(tmp_path / "pt" / "distillation" / "weights.safetensors")
    assert all(torch.allclose(weights[0][name], value) for name, value in before.items())
    assert weights[1].keys() != before.keys()


def test_heads_of_a_task_of_similar_name_do_not_go_on_with_it(make, tmp_path):
    before, after = (objective(head="mlp").tasks["depth"] for _ in range(2))
    other = after.model_copy(update={"target": after.target.model_copy(update={"model": "other colors"})})
    run_stage(make("pt", "pt", Distillation(tasks={"depth": before, "depth_metric": before})))
    tasks = Distillation(tasks={"depth": before, "depth_metric": other})
    run_stage(make("ift", distillation=tasks, start="pt", optimization={"lr": 1e-12, "max_steps": 1}))
    pt, ift = (load_file(tmp_path / name / "distillation" / "weights.safetensors") for name in ("pt", "ift"))
    for name, weights in pt.items():
        if name.endswith("weight"):
            assert torch.allclose(ift[name], weights, atol=1e-6) == ("depth_metric" not in name), name


class Named(TokenHead):
    """A linear layer of a name that the user may change."""

    part = "layer"

    def __init__(self, llm_width, target):
        super().__init__()
        setattr(self, self.part, torch.nn.Linear(llm_width, target.width))

    def forward(self, states):
        return getattr(self, self.part)(states)


def test_a_head_whose_code_has_changed_does_not_go_on(make, student, tmp_path, monkeypatch):
    own = objective(head=f"{__name__}:Named")
    run_stage(make("pt", "pt", own))
    assert continue_objective(model_of(student, own), own, str(tmp_path / "pt")) == ["depth"]
    monkeypatch.setattr(Named, "part", "renamed")
    assert continue_objective(model_of(student, own), own, str(tmp_path / "pt")) == []


class Centered(TokenHead):
    """Subtracts a running mean, a buffer beside the layers."""

    def __init__(self, llm_width, target):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(llm_width, target.width))
        self.register_buffer("center", torch.zeros(llm_width))

    def forward(self, states):
        if self.training:
            self.center = 0.5 * self.center + 0.5 * states.detach().float().mean((0, 1))
        return self.layers(states - self.center)


@pytest.mark.parametrize("head", ["mlp", f"{__name__}:Centered"])
def test_an_objective_in_fine_tuning_resumes_exactly(make, tmp_path, head):
    distillation = objective(head=head, loss={"cosine": 1.0, "info_nce": 0.3}, schedule={"end": 0.8})
    straight = make("straight", distillation=distillation)
    run_stage(straight)
    stopped = make("stopped", distillation=distillation)
    with pytest.raises(KeyboardInterrupt):
        run_stage(stopped, callbacks=[_StopAfter(2)])
    run_stage(stopped, resume=True)
    for part in ("model/model.safetensors", "distillation/weights.safetensors"):
        one, two = (load_file(tmp_path / name / part) for name in ("straight", "stopped"))
        assert all(torch.equal(one[name], two[name]) for name in one)


class _StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step > self.step:
            raise KeyboardInterrupt
