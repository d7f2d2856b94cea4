"""The embedding losses in TRL's SFTTrainer: gradients of the global batch, exact resume, and no silent zero."""

import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback, TrainingArguments

from tests import tiny
from tests.vlms import FAMILIES, PROCESSORS, save_vlm
from visper.config import Geometry
from visper.config import Student as StudentConfig
from visper.data.images import arrange, background_of, rgb_bytes
from visper.distillation import DistilledTask, Head, Position, attach
from visper.model import build_student
from visper.model.student import save_student
from visper.training import DistillationMixin
from visper.training.teacher_collator import SHARE, TeacherCollator

trl = pytest.importorskip("trl")

TERMS = {"depth/1/smooth_l1", "depth/1/info_nce", "depth/3/smooth_l1", "gen/2/info_nce"}


class DistilledSFTTrainer(DistillationMixin, trl.SFTTrainer):
    pass


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return save_vlm(tmp_path_factory.mktemp("student"), "qwen3_vl")


def picture(color, size=(16, 24)):
    return Image.new("RGB", size, color)


def row(*images, answer="thing"):
    return {
        "images": list(images),
        "messages": [{"role": "user", "content": "what?"}, {"role": "assistant", "content": answer}],
    }


ROWS = [
    row(picture("red"), answer="a red thing"),
    row(picture("blue", (32, 32)), picture("green")),  # two images of different sizes
    row(),
    row(picture("yellow"), answer="y"),
]


def teachers():
    return {"depth": tiny.PooledColors("a", grid=2, width=6), "gen": tiny.PooledColors("b", grid=1, width=8)}


def make_trainer(
    student,
    folder,
    rows=ROWS,
    kind=DistilledSFTTrainer,
    model=None,
    own=None,
    distiller=None,
    extra=None,
    seed=0,
    tasks=None,
    **settings,
):
    torch.manual_seed(seed)
    model = model or AutoModelForImageTextToText.from_pretrained(student)
    own = teachers() if own is None else own
    layers = {"depth": (1, 3), "gen": (2,)}
    tasks = tasks or {name: DistilledTask(teacher.spec, layers[name]) for name, teacher in own.items()}
    defaults = {"per_device_train_batch_size": 4, "max_steps": 2, "optim": "sgd", "learning_rate": 0.1}
    defaults |= {"logging_steps": 1, "report_to": "none", "use_cpu": True, "max_length": None, "save_strategy": "no"}
    defaults |= {"max_grad_norm": 0.0, "lr_scheduler_type": "constant", "disable_tqdm": True, "bf16": False}
    return kind(
        model,
        trl.SFTConfig(str(folder), **{**defaults, **settings}),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoProcessor.from_pretrained(student),
        distiller=distiller or attach(model, tasks),
        teachers=own,
        **(extra or {}),
    )


def weights_of(trainer):
    named = [*trainer.model.named_parameters(), *trainer.distiller.named_parameters()]
    return {name: parameter.detach().clone() for name, parameter in named}


def history_of(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def terms_of(trainer):
    return [{name: value for name, value in entry.items() if "/" in name} for entry in history_of(trainer)]


def test_it_trains_and_logs_every_term(student, tmp_path):
    trainer = make_trainer(student, tmp_path, max_steps=8)
    before = weights_of(trainer)
    trainer.train()
    history = history_of(trainer)
    assert history[0].keys() >= TERMS and history[0]["num_images"] == 4
    for term in ("depth/1/smooth_l1", "depth/3/smooth_l1", "gen/2/smooth_l1"):
        assert 0 < history[-1][term] < history[0][term], f"{term} does not fall"
    moved = [name for name, value in weights_of(trainer).items() if not torch.equal(value, before[name])]
    assert {name.split(".")[0] for name in moved} >= {"model", "objective", "queries"}


def test_the_loss_is_sfts_plus_the_weighted_terms(student, tmp_path):
    trainer = make_trainer(student, tmp_path, max_steps=1, learning_rate=0.0)
    trainer.train()
    (found,) = history_of(trainer)
    plain = make_trainer(student, tmp_path, max_steps=1, learning_rate=0.0)
    plain.distiller.objective.total = lambda terms, progress: sum(terms.values()) * 0
    plain.train()
    (without,) = history_of(plain)
    terms = {name: torch.tensor(found[name]) for name in found if "/" in name}
    expected = without["loss"] + trainer.distiller.total(terms).item()
    assert found["loss"] == pytest.approx(expected, rel=1e-5) and found["loss"] > without["loss"] + 0.1


class NothingElse(trl.SFTTrainer):
    """Without its own loss: some models' is the mean over micro-batches, whatever these hold."""

    def compute_loss(self, *args, **options):
        return super().compute_loss(*args, **options) * 0.0


class DistillationAlone(DistillationMixin, NothingElse):
    pass


SPLITS = {
    "micro-batches": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    "recomputed": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl"])
def test_micro_batches_and_recomputed_layers_change_no_gradient(tmp_path, family):
    student = save_vlm(tmp_path / "student", family)
    kind = DistillationAlone if family == "qwen2_5_vl" else DistilledSFTTrainer
    whole = make_trainer(student, tmp_path, kind=kind, gradient_checkpointing=False)
    whole.train()
    for settings in SPLITS.values():
        split = make_trainer(student, tmp_path, kind=kind, **{"gradient_checkpointing": False, **settings})
        split.train()
        # Other batch sizes take other kernels.
        for name, value in weights_of(whole).items():
            torch.testing.assert_close(weights_of(split)[name], value, rtol=1e-4, atol=1e-5, msg=name)
        for one, other in zip(terms_of(whole), terms_of(split), strict=True):
            assert one == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_at_every_position(tmp_path, family):
    """Images of native sizes, tiles and several views; two rows have another number of tokens than the others."""
    student = save_vlm(tmp_path / "student", family)
    own = {name: tiny.PooledColors("a", grid=2, width=6) for name in ("resampled", "laid", "entering")}
    mlp = Head.model_validate({"kind": "mlp", "depth": 2, "width": 8})
    tasks = {
        "resampled": DistilledTask(own["resampled"].spec, (1, 3)),
        "laid": DistilledTask(own["laid"].spec, (2,), mlp, at=Position.IMAGE_TOKENS, loss={"cosine": 1.0}),
        "entering": DistilledTask(own["entering"].spec, (), mlp, at=Position.PROJECTOR, loss={"mse": 1.0}),
    }
    trainer = make_trainer(student, tmp_path, own=own, tasks=tasks)
    trainer.train()
    assert len(terms_of(trainer)) == 2
    for terms in terms_of(trainer):
        assert len(terms) == 6 and all(value > 0 for value in terms.values())


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])  # the second is saved under other names than its own
def test_a_resumed_run_ends_as_one_that_never_stopped(tmp_path, family):
    student = save_vlm(tmp_path / "student", family)
    settings = {"optim": "adamw_torch", "max_steps": 4, "learning_rate": 1e-2, "save_strategy": "steps"}
    settings |= {"save_steps": 2, "per_device_train_batch_size": 2, "max_grad_norm": 1.0}
    once = make_trainer(student, tmp_path, **settings)
    once.train()
    again = make_trainer(student, tmp_path, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, value in weights_of(once).items():
        assert torch.equal(weights_of(again)[name], value), name
    assert terms_of(again)[2:] == terms_of(once)[2:]
    AutoModelForImageTextToText.from_pretrained(tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-2" / "distiller.safetensors").unlink()
    with pytest.raises(ValueError, match="resume a checkpoint that was saved with the distiller"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    other = make_trainer(student, tmp_path, own={"depth": teachers()["depth"]}, **settings)
    with pytest.raises(ValueError, match=r"belongs to other tasks: \d+ parameters differ"):
        other.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("family", ["qwen3_vl", "llava_onevision"])
def test_the_best_model_comes_with_its_distiller(tmp_path, family):
    """``llava_onevision`` is saved under other names than its own, which the Trainer does not translate back."""
    by_step = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, **options):
            by_step[state.global_step] = weights_of(trainer)

    evaluates = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    evaluates |= {"metric_for_best_model": "loss", "greater_is_better": True}  # a falling loss: the first is "best"
    trainer = make_trainer(
        save_vlm(tmp_path / "student", family),
        tmp_path,
        load_best_model_at_end=True,
        extra={"eval_dataset": Dataset.from_list(ROWS), "callbacks": [Keep()]},
        **evaluates,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    for name, value in weights_of(trainer).items():
        assert torch.equal(value, by_step[1][name]), name


def test_adapters_resume_exactly(tmp_path):
    peft = pytest.importorskip("peft")
    student = save_vlm(tmp_path / "student", "qwen2_5_vl")

    def make():
        extra = {"peft_config": peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2)}
        settings = {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2}
        return make_trainer(student, tmp_path, optim="adamw_torch", max_steps=4, extra=extra, **settings)

    once, again = make(), make()
    once.train()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, value in weights_of(once).items():
        assert torch.equal(weights_of(again)[name], value), name


def test_adapters_train_and_frozen_weights_stay(student, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2)
    trainer = make_trainer(student, tmp_path, max_steps=6, extra={"peft_config": config, "distiller_lr": 0.2})
    before = weights_of(trainer)
    trainer.train()
    moved = {name for name, value in weights_of(trainer).items() if not torch.equal(value, before[name])}
    assert any("lora_" in name for name in moved)
    assert all("lora_" in name or name.startswith(("objective", "queries")) for name in moved)
    assert terms_of(trainer)[-1]["depth/3/smooth_l1"] < terms_of(trainer)[0]["depth/3/smooth_l1"]


def test_rates_and_decay_are_by_parameter(student, tmp_path):
    trainer = make_trainer(student, tmp_path, weight_decay=0.1, extra={"distiller_lr": 0.3})
    groups = trainer.create_optimizer().param_groups
    own = {id(parameter): name for name, parameter in trainer.distiller.named_parameters()}
    found = {own[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"] if id(p) in own}
    assert found.keys() == set(own.values()) and {lr for lr, _ in found.values()} == {0.3}
    assert {decay for name, (_, decay) in found.items() if name.endswith("bias")} == {0.0}
    assert {decay for name, (_, decay) in found.items() if "logit_scales" in name} == {0.0}
    assert {decay for name, (_, decay) in found.items() if name.startswith("queries.")} == {0.1}
    assert sum(len(g["params"]) for g in trainer.create_optimizer().param_groups) == sum(
        len(g["params"]) for g in groups
    )


def test_evaluation_is_the_trainers_own(student, tmp_path):
    rows = Dataset.from_list(ROWS)
    trainer = make_trainer(student, tmp_path, extra={"eval_dataset": rows})
    plain = trl.SFTTrainer(
        trainer.model, trainer.args, train_dataset=rows, eval_dataset=rows, processing_class=trainer.processing_class
    )
    found, expected = trainer.evaluate(), plain.evaluate()
    assert found["eval_loss"] == expected["eval_loss"]
    assert not [name for name in found if "smooth_l1" in name]


def test_a_batch_of_text_changes_no_head(student, tmp_path):
    trainer = make_trainer(student, tmp_path, rows=[row(), row(), row(), row()])
    before = weights_of(trainer)
    trainer.train()
    after = weights_of(trainer)
    assert all(torch.equal(after[name], before[name]) for name, _ in trainer.distiller.named_parameters())
    assert history_of(trainer)[0]["num_images"] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"torch_compile": True}, "does not support torch_compile"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, "re-entrant gradient checkpointing"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches"),
    ],
)
def test_settings_under_which_the_losses_would_be_wrong_are_refused(student, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(student, tmp_path, **settings)


def test_an_optimizer_that_lacks_the_heads_is_refused(student, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(student)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="optimizer_cls_and_kwargs"):
        make_trainer(student, tmp_path, model=model, extra={"optimizers": (optimizer, None)})


def test_teachers_that_do_not_fit_the_tasks_are_refused(student, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(student)
    distiller = attach(model, {"depth": DistilledTask(teachers()["depth"].spec, (1,))})
    with pytest.raises(ValueError, match=r"teachers \['depth', 'gen'\] for tasks \['depth'\]"):
        make_trainer(student, tmp_path, model=model, distiller=distiller)
    wider = {"depth": tiny.PooledColors("a", grid=2, width=7)}
    with pytest.raises(ValueError, match=r"the teacher's target is .*width=7.*attach the task with its teacher's spec"):
        make_trainer(student, tmp_path, model=model, distiller=distiller, own=wider)


def test_a_frozen_front_of_the_model_is_no_silent_success(student, tmp_path):
    trainer = make_trainer(student, tmp_path, gradient_checkpointing=False)
    trainer.model.requires_grad_(False)
    trainer.model.lm_head.requires_grad_(True)
    with pytest.raises(
        ValueError, match=r"no trainable parameter of the model comes before the tapped layers \[1, 2, 3\]"
    ):
        trainer.train()


def test_a_distiller_of_another_model_is_an_error(student, tmp_path):
    other = AutoModelForImageTextToText.from_pretrained(student)
    own = {"depth": teachers()["depth"]}
    distiller = attach(other, {"depth": DistilledTask(own["depth"].spec, (1,))})
    with pytest.raises(ValueError, match="the distiller is attached to another model"):
        make_trainer(student, tmp_path, own=own, distiller=distiller).train()


TEXT = [{"messages": row()["messages"]}] * 4


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (TEXT, {}, "needs rows with a column 'images' or 'image', found"),
        (ROWS, {"max_length": 4}, "max_length"),
    ],
)
def test_rows_without_their_images_are_errors(student, tmp_path, rows, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(student, tmp_path, rows=rows, **settings).train()


def test_images_that_the_column_lacks_are_an_error():
    processor = PROCESSORS["qwen2_5_vl"]()
    token = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")

    def collator(examples):
        return {"input_ids": torch.tensor([[1, token, token, 2]] * len(examples))}

    collate = TeacherCollator(collator, {}, processor, token)
    with pytest.raises(
        ValueError, match="row 0 of the batch has 0 images in its column, but its text has 2 image tokens"
    ):
        collate([{"images": []}])
    with pytest.raises(ValueError, match="is a str, but teachers need PIL images"):
        collate([{"image": "red.png"}])
    assert collate([{"image": picture("red")}])[SHARE]["image_tokens"].tolist() == [2]


@pytest.mark.parametrize("geometry", Geometry)
def test_a_llava_and_its_teachers_see_the_same_part_of_an_image(tmp_path, tiny_llm, tiny_encoder, geometry):
    config = StudentConfig(llm=str(tiny_llm), encoder=str(tiny_encoder), task_tokens=None)
    save_student(build_student(config, geometry), tmp_path / "student")
    trainer = make_trainer(tmp_path / "student", tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    share, images = batch[SHARE], [image for shown in trainer.train_dataset["images"] for image in shown]
    assert sorted(share["image_rows"].bincount(minlength=4).tolist()) == [0, 1, 1, 2], "two images stand side by side"
    seen = {image.numpy().tobytes() for image in share["teacher_images"]["depth"]}
    background = background_of(trainer.processing_class.image_processor)
    preprocess = trainer.teachers["depth"].preprocess
    assert seen == {preprocess(rgb_bytes(arrange(image, geometry, background))).numpy().tobytes() for image in images}
    padded = share["places"] is not None and share["places"].isnan().any()
    assert bool(padded) == (geometry == Geometry.PAD)
    trainer.train()
    assert all(value > 0 for terms in terms_of(trainer) for value in terms.values())


def test_transformers_own_trainer_and_bfloat16_will_do(student, tmp_path):
    processor = AutoProcessor.from_pretrained(student)
    own = trl.trainer.sft_trainer.DataCollatorForVisionLanguageModeling(processor)
    model = AutoModelForImageTextToText.from_pretrained(student, dtype=torch.bfloat16)
    tasks = {"depth": DistilledTask(teachers()["depth"].spec, (1, 3))}
    settings = {"max_steps": 6, "logging_steps": 1, "learning_rate": 1e-2, "report_to": "none", "use_cpu": True}
    trainer = DistillationMixin(
        model,
        TrainingArguments(str(tmp_path), bf16=True, remove_unused_columns=False, save_strategy="no", **settings),
        data_collator=own,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=processor,
        distiller=attach(model, tasks),
        teachers={"depth": teachers()["depth"]},
    )
    trainer.train()
    history = terms_of(trainer)
    assert history[-1]["depth/3/smooth_l1"] < history[0]["depth/3/smooth_l1"]
    assert {parameter.dtype for parameter in trainer.distiller.parameters()} == {torch.float32}
