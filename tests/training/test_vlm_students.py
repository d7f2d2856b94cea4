"""Any image-text-to-text model as a student: its own processor, its own loss, its own folder."""

import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Blip2Config,
    LlamaConfig,
    LlavaConfig,
    TrainerCallback,
)

from tests.records import records_of
from tests.tiny import write_rows
from tests.vlms import FAMILIES, save_vlm
from visper.common.errors import ConfigError
from visper.config import Distillation, Engine, Geometry, Run, Stage, VlmStudent, load_run
from visper.data.collator import Collator, Sample
from visper.data.dataset import ConversationDataset
from visper.data.packing import PackingCollator
from visper.data.rows.records import Record, ShownImage, Turn
from visper.data.vlm import ModelInputs, encoder_for
from visper.distillation import Targets
from visper.distillation.teachers.tasks import planned_specs
from visper.evaluation import answer
from visper.evaluation.ask import as_row
from visper.evaluation.predictions import load_pre_trained, predict_images
from visper.evaluation.visualize import SIDE, look
from visper.model import load_processor, load_student, save_student
from visper.model.logits import logit_cap
from visper.model.parts import parameters_of, part_of
from visper.model.start import starting_processor, starting_student
from visper.model.vlm import build_vlm, build_vlm_processor
from visper.planning.fake_run import FakeRun, fake_batch
from visper.planning.fake_step import KnownPositions
from visper.planning.memory import Machine
from visper.planning.plan import Plan
from visper.planning.row_statistics import RowLength
from visper.training.assemble import build_training_model, choose_trainable
from visper.training.attention import separate_samples
from visper.training.flops import FlopMeter
from visper.training.module import FORWARD_KEYS, TrainingModel
from visper.training.run import run_stage

every_family = pytest.mark.parametrize("family", FAMILIES)
FAST = "qwen3_vl"


def trained(families: tuple[str, ...]) -> list[Any]:
    """Families as parameters of a test that trains; `make test-fast` trains one of them."""
    return [family if family == FAST else pytest.param(family, marks=pytest.mark.slow) for family in families]


training_every_family = pytest.mark.parametrize("family", trained(FAMILIES))


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model of each family."""
    return {family: save_vlm(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


def question(text: str, answer: str, *images: Path) -> Record:
    """The first image leads the question, others stand within it."""
    shown = tuple(ShownImage(str(image), 0, 5 * at) for at, image in enumerate(images))
    return Record(text, (Turn("user", text), Turn("assistant", answer)), shown)


def images_of(row: Record) -> list[Image.Image]:
    return [Image.open(shown.path).convert("RGB") for shown in row.images]


@pytest.fixture
def rows(tmp_path: Path) -> list[Record]:
    """Rows with an image each, of different sizes; one without, one with both."""
    generator = torch.Generator().manual_seed(0)
    for name, (height, width) in {"wide": (24, 40), "tall": (50, 20)}.items():
        pixels = torch.randint(0, 255, (height, width, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{name}.png")
    return [
        question("what is it?", "a thing", tmp_path / "wide.png"),
        question("say it", "words"),
        question("and this?", "another, longer answer", tmp_path / "tall.png"),
        question("this,that?", "both", tmp_path / "tall.png", tmp_path / "wide.png"),
    ]


def batch_of(student: Any, rows: list[Record], around: Any = lambda collator: collator) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        dataset = ConversationDataset(records_of(Path(folder), rows), encoder_for(student.processor))
        samples = [dataset[i] for i in range(len(rows))]
    assert all(isinstance(sample, Sample) for sample in samples), samples
    inputs = ModelInputs(student.processor, student.image_token_id)
    return dict(around(Collator(student.processor.tokenizer.pad_token_id, model_inputs=inputs))(samples))


@every_family
def test_rows_have_the_ids_that_the_models_own_processor_makes(family, folders, rows):
    processor: Any = AutoProcessor.from_pretrained(folders[family])
    encoder = encoder_for(processor)
    for row in rows:
        images = images_of(row)
        messages = [{"role": turn.role, "content": [{"type": "text", "text": turn.text}]} for turn in row.turns]
        if images:
            messages[0]["content"].insert(0, {"type": "image"})
        if len(images) > 1:
            texts = [{"type": "text", "text": part} for part in (row.turns[0].text[:5], row.turns[0].text[5:])]
            messages[0]["content"] = [{"type": "image"}, texts[0], {"type": "image"}, texts[1]]
        text = processor.apply_chat_template(messages, tokenize=False)
        expected = processor(text=[text], images=[images] if images else None, add_special_tokens=False)
        encoded = encoder.encode(row, [image.size for image in images])
        assert encoded.input_ids == list(expected["input_ids"][0])
        assert len(encoded.image_tokens) == len(images)
        assert sum(encoded.image_tokens) == encoded.input_ids.count(encoder.image_token_id)
        supervised = [token for token in encoded.labels if token != -100]
        end = {"smolvlm": "<end_of_utterance>", "gemma3": "<end_of_turn>", "gemma4": "<turn|>"}.get(
            family, "<|im_end|>"
        )
        # SmolVLM's prompt ends before the space that its template writes before an answer.
        assert processor.tokenizer.decode(supervised) == " " * (family == "smolvlm") + row.turns[1].text + end


def test_of_several_named_templates_the_default_is_used(folders, tmp_path):
    shutil.copytree(folders[FAST], tmp_path / "named")
    processor: Any = AutoProcessor.from_pretrained(folders[FAST])
    own = processor.chat_template
    processor.chat_template = {"default": own, "tool_use": own + "tools"}
    processor.save_pretrained(tmp_path / "named")
    assert isinstance(AutoProcessor.from_pretrained(tmp_path / "named").chat_template, dict)
    assert build_vlm_processor(VlmStudent(vlm=str(tmp_path / "named"))).chat_template == own


@every_family
def test_control_tokens_spelt_out_in_a_text_stay_text(family, folders, rows):
    processor: Any = AutoProcessor.from_pretrained(folders[family])
    encoder = encoder_for(processor)
    plain = encoder.encode(question("what is  it?", "a thing", Path("x")), [(40, 24)])
    spelt = encoder.encode(question(f"what is {processor.image_token} it?", "a thing", Path("x")), [(40, 24)])
    count = plain.input_ids.count(encoder.image_token_id)
    assert spelt.input_ids.count(encoder.image_token_id) == count
    assert len(spelt.input_ids) == len(plain.input_ids) + len(processor.image_token)


@every_family
def test_text_is_cut_and_images_are_not(family, folders):
    encoder = encoder_for(AutoProcessor.from_pretrained(folders[family]))
    row = question("q" * 50, "a" * 200, Path("x"))
    complete = encoder.encode(row, [(40, 24)])
    encoder.max_tokens = 180
    cut = encoder.encode(row, [(40, 24)])
    assert cut.truncated and len(cut.input_ids) == 180
    assert cut.input_ids == complete.input_ids[:180]


@every_family
def test_the_loss_is_the_models_own(family, folders, rows):
    student = build_vlm(VlmStudent(vlm=str(folders[family])))
    batch = batch_of(student, rows)
    own = student.model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        labels=batch["labels"],
        **batch["model_inputs"],
    ).loss
    supervised = (batch["labels"][:, 1:] != -100).sum()
    model = TrainingModel(student).eval()
    keys = ("input_ids", "attention_mask", "labels", "model_inputs", "image_rows")
    loss = model(**{key: batch[key] for key in keys}, num_tokens=supervised)["loss"]
    # The same logarithms summed, then divided: at most 8.4e-8 was seen.
    assert torch.allclose(loss, own, rtol=3e-7, atol=0)


PACKED = tuple(family for family in FAMILIES if family not in ("qwen3_5", "gemma3", "gemma4"))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", PACKED)
def test_packed_rows_have_the_loss_and_gradients_of_padded_ones(family, attention, folders, rows):
    student = build_vlm(VlmStudent(vlm=str(folders[family])))
    padded = batch_of(student, rows)
    packed = batch_of(student, rows, PackingCollator)
    assert packed["input_ids"].shape == (1, padded["attention_mask"].sum())
    model = TrainingModel(student).train()
    llm: Any = student.model.get_decoder()
    llm.set_attn_implementation(attention)
    found = []
    for batch in (padded, packed):
        if batch is packed:
            separate_samples(llm)
        model.zero_grad()
        loss = model(**{key: batch[key] for key in FORWARD_KEYS if key in batch}, num_tokens=10)["loss"]
        loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        found[-1]["loss"] = loss.detach()
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        # Sums in another order: at most 7.7e-7 of the largest was seen; those of key biases are zero but for rounding.
        assert (value - found[1][name]).abs().max() <= 2e-6 * value.abs().max() + 1e-8, name


class LastLogits(TrainerCallback):
    """The logits of one row at the end of training."""

    def __init__(self, row: Record) -> None:
        self.row = row
        self.logits: torch.Tensor | None = None

    def on_train_end(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
        model.eval()
        self.logits = logits_of(model.student, model.processor, self.row)


@torch.no_grad()
def logits_of(model: Any, processor: Any, row: Record) -> torch.Tensor:
    encoder = encoder_for(processor)
    images = images_of(row)
    ids = torch.tensor([encoder.encode(row, [image.size for image in images]).input_ids])
    inputs = ModelInputs(processor, model.config.image_token_id)(ids, [images])
    result: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs).logits
    return result


def run_of(folder: Path, vlm: Path, stage: str, **changes: Any) -> Run:
    """Two steps on rows with and without images."""
    rows = write_rows(folder / "rows", images=6, text_rows=4)
    settings: dict[str, Any] = {
        "name": "vlm",
        "stage": stage,
        "output": str(folder / "out"),
        "student": {"vlm": str(vlm)},
        "data": {
            "sources": [{"json": str(rows / "rows.json"), "images": str(rows / "images")}],
            "workers": 0,
            "max_tokens": 500,
        },
        "optimization": {"global_batch": 4, "micro_batch": 2, "lr": 1e-3, "max_steps": 2, "precision": "float32"},
        "logging": {"every": 1},
        **changes,
    }
    (folder / "run.yaml").write_text(json.dumps(settings), encoding="utf-8")
    return load_run(folder / "run.yaml")


def changed_parts(before: Any, after: Any) -> set[str | None]:
    old = dict(before.named_parameters())
    return {part_of(name) for name, value in after.named_parameters() if not torch.equal(value, old[name])}


@training_every_family
@pytest.mark.parametrize("stage", ["pt", "vpt", "ift"])
def test_a_stage_trains_its_parts_and_ends_as_the_models_plain_folder(family, stage, folders, rows, tmp_path):
    seen = LastLogits(rows[0])
    run_stage(run_of(tmp_path, folders[family], stage), callbacks=[seen])
    model: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "out" / "model")
    before = AutoModelForImageTextToText.from_pretrained(folders[family])
    expected = {"pt": {"projector"}, "vpt": {"vision", "projector", "llm"}, "ift": {"projector", "llm"}}
    assert changed_parts(before, model) == expected[stage]
    processor = AutoProcessor.from_pretrained(tmp_path / "out" / "model")
    assert seen.logits is not None
    assert torch.equal(logits_of(model.eval(), processor, rows[0]), seen.logits)


@training_every_family
def test_lora_is_merged_into_the_plain_folder(family, folders, rows, tmp_path):
    pytest.importorskip("peft")
    seen = LastLogits(rows[0])
    run_stage(run_of(tmp_path, folders[family], "ift", lora={"rank": 2, "alpha": 4}), callbacks=[seen])
    model: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "out" / "model")
    assert seen.logits is not None
    # Merged weights are sums rounded once: at most 1.9e-6 was seen.
    assert torch.allclose(
        logits_of(model.eval(), load_student(tmp_path / "out").processor, rows[0]), seen.logits, atol=1e-5
    )


@training_every_family
def test_the_finished_folder_answers(family, folders, rows, tmp_path):
    run_stage(run_of(tmp_path, folders[family], "ift"))
    student = load_student(tmp_path / "out")
    asked = ["what is it?", "and this, then?", "say it"]
    images = [images_of(rows[0]), images_of(rows[2]), []]
    together = answer(student, asked, images, max_new_tokens=4)
    alone = [answer(student, [text], [own], 4) for text, own in zip(asked, images, strict=True)]
    assert [[said] for said in together] == alone


@pytest.mark.parametrize(
    ("family", "max_pixels"),
    [("llava_onevision", 512), ("qwen2_5_vl", 512), ("qwen3_vl", 512), ("internvl", 512), ("smolvlm", 256)],
)
def test_max_pixels_limits_the_tokens_of_an_image_and_is_saved(family, max_pixels, folders, tmp_path):
    large = (400, 300)
    row = question("what?", "a thing", Path("x"))
    unlimited = encoder_for(AutoProcessor.from_pretrained(folders[family])).encode(row, [large])
    student = build_vlm(VlmStudent(vlm=str(folders[family]), max_pixels=max_pixels))
    save_student(student, tmp_path / "saved")
    encoded = [encoder_for(p).encode(row, [large]) for p in (student.processor, load_processor(tmp_path / "saved"))]
    assert encoded[0] == encoded[1]
    assert len(encoded[0].input_ids) < len(unlimited.input_ids)
    saved = load_student(tmp_path / "saved")
    pixels = Image.new("RGB", large)
    inputs = ModelInputs(saved.processor, saved.image_token_id)
    ids = torch.tensor([encoded[0].input_ids])
    saved.model(input_ids=ids, **inputs(ids, [[pixels]]))  # refuses counts of tokens and features that differ


def test_a_limit_that_does_nothing_or_too_much_is_refused(folders):
    with pytest.raises(ConfigError, match=r"Gemma3.*no limit that is known here"):
        build_vlm(VlmStudent(vlm=str(folders["gemma3"]), max_pixels=1000))
    for family in ("llava_onevision", "qwen3_vl", "internvl", "smolvlm"):
        with pytest.raises(ConfigError, match="at least"):
            build_vlm(VlmStudent(vlm=str(folders[family]), max_pixels=10))


def test_models_that_are_not_known_are_refused_before_their_weights_load(folders, tmp_path):
    LlamaConfig().save_pretrained(tmp_path / "llama")
    with pytest.raises(ConfigError, match="does not load as an image-text-to-text model"):
        build_vlm(VlmStudent(vlm=str(tmp_path / "llama")))
    Blip2Config().save_pretrained(tmp_path / "blip")
    with pytest.raises(ConfigError, match="no parts for 'vision'"):
        build_vlm(VlmStudent(vlm=str(tmp_path / "blip")))
    LlavaConfig().save_pretrained(tmp_path / "llava")
    with pytest.raises(ConfigError, match="set start_from"):
        build_vlm(VlmStudent(vlm=str(tmp_path / "llava")))


def test_a_bound_of_logits_counts_where_the_model_applies_it(folders):
    model: Any = AutoModelForImageTextToText.from_pretrained(folders["gemma3"])
    assert logit_cap(model) is None
    model.config.text_config.final_logit_softcapping = 0.5
    assert logit_cap(model) is None  # this class ignores it
    plain = model.forward
    model.forward = lambda **inputs: bounded(plain(**inputs), 0.5)
    assert logit_cap(model) == 0.5
    model.config.text_config.final_logit_softcapping = 30.0
    model.forward = lambda **inputs: bounded(plain(**inputs), 30.0)
    assert logit_cap(model) == 30.0, "logits so small that the cap hardly changes them"
    model.forward = lambda **inputs: bounded(plain(**inputs), 0.5)
    with pytest.raises(ConfigError, match="does more to its logits"):
        logit_cap(model)
    model.config.text_config.final_logit_softcapping = 0.5
    model.bfloat16().forward = lambda **inputs: bounded(plain(**inputs), 0.5)
    assert logit_cap(model) == 0.5


def bounded(output: Any, cap: float) -> Any:
    output.logits = cap * torch.tanh(output.logits / cap)
    return output


def test_what_such_a_student_does_not_support_is_refused(folders, tmp_path):
    with pytest.raises(ConfigError, match=r"key 'student': 'vlm' is a complete model.*remove \['llm', 'encoder'\]"):
        run_of(tmp_path / "a", folders["gemma3"], "pt", student={"vlm": "x", "llm": "y", "encoder": "z"})
    with pytest.raises(ConfigError, match=r"unknown key 'student\.max_pixel': did you mean 'max_pixels'"):
        run_of(tmp_path / "b", folders["gemma3"], "pt", student={"vlm": "x", "max_pixel": 3})
    run = run_of(tmp_path / "c", folders["gemma3"], "pt")
    with pytest.raises(ConfigError, match="geometry=pad is not supported by Gemma3Processor"):
        starting_processor(run.model_copy(update={"data": run.data.model_copy(update={"geometry": Geometry.PAD})}))
    zero3 = run.launch.model_copy(update={"engine": Engine.ZERO3})
    with pytest.raises(ConfigError, match=r"Use launch[.]engine=fsdp or zero2"):
        starting_processor(run.model_copy(update={"launch": zero3}))
    packed = run.optimization.model_copy(update={"packing": True})
    with pytest.raises(ConfigError, match="packing is not supported by models of type 'gemma3'"):
        starting_student(run.model_copy(update={"optimization": packed}))
    joined = run.data.model_copy(update={"join_conversations": True})
    with pytest.raises(ConfigError, match="join_conversations is not supported"):
        starting_processor(run.model_copy(update={"data": joined}))


def costs_of(model: TrainingModel, batch: dict[str, Any], sizes: Any) -> Any:
    meter = FlopMeter()
    with meter.watch(model, batch["input_ids"].numel(), sizes):
        model(**batch)
    assert meter.costs is not None and meter.costs.image_token
    return meter.costs


PLANNED = dict(zip(FAMILIES, ("pt", "ift", "vpt", "ift", "ift", "vpt", "ift", "vpt", "ift"), strict=True))


@training_every_family
def test_a_run_is_planned_without_weights(family, folders, tmp_path):
    """Operations are those that torch counts in the real model."""
    stage = PLANNED[family]
    packing = stage == "ift" and family in PACKED
    optimization = {"global_batch": 4, "micro_batch": 2, "lr": 1e-3, "precision": "float32", "packing": packing}
    more = {"distillation": supervised_at_every_place(), "optimization": optimization}
    student = {"vlm": str(folders[family]), "max_pixels": None, "task_tokens": {"order": ["depth"], "per_task": 2}}
    run = run_of(tmp_path, folders[family], stage, student=student, **more)
    found = Plan(run, Machine(1, 80e9))
    assert found.rows.count == 10 and "640 x 480 pixels" in found.rows.source
    assert found.memory.parts["activations"] > 0 and found.fits
    parts = {part.part: part for part in found.parts}
    assert {"vision": stage == "vpt", "projector": True, "llm": stage != "pt"} == {
        part: parts[part].trainable > 0 for part in ("vision", "projector", "llm")
    }
    student = build_vlm(run.student)
    assert parts["llm"].total == sum(p.numel() for _, p in parameters_of(student.model, "llm"))
    model = FakeRun(run, run, planned_specs(run.distillation))
    rows = [RowLength(found.rows.average.tokens + 40, 5, 1), RowLength(50, 5, 0)]
    batch, sizes = fake_batch(rows, model.student, model.model, model.run, model.fake)
    with KnownPositions(model.fake):
        planned = costs_of(model.model, batch, sizes)
    real = build_training_model(student, Stage(stage), run.distillation, planned_specs(run.distillation))
    choose_trainable(real, Stage(stage), run.optimization)
    if packing:
        separate_samples(student.model.get_decoder())
    pool = Targets(torch.zeros(1, 9, 8), torch.zeros(4, 9, 8), torch.zeros(1).long())
    targets = dict.fromkeys(batch["targets"], pool)
    assert planned == costs_of(real.train(), {**batch, "targets": targets}, sizes)


@every_family
def test_encoders_and_collators_travel_to_loader_processes(family, folders):
    processor = AutoProcessor.from_pretrained(folders[family])
    encoder = pickle.loads(pickle.dumps(encoder_for(processor)))
    row = question("what?", "a thing", Path("x"))
    assert encoder.encode(row, [(40, 24)]) == encoder_for(processor).encode(row, [(40, 24)])
    pickle.dumps(ModelInputs(processor, encoder.image_token_id))


def test_a_later_stage_starts_from_the_folder_of_the_one_before(folders, tmp_path):
    run_stage(run_of(tmp_path / "first", folders["qwen3_vl"], "pt"))
    run_stage(
        run_of(
            tmp_path / "second", folders["qwen3_vl"], "ift", student=None, start_from=str(tmp_path / "first" / "out")
        )
    )
    assert not load_student(tmp_path / "second" / "out").is_llava


def supervised_at_every_place() -> dict[str, Any]:
    """Tasks at the projector and at image tokens, by every kind of head, with a teacher's target and the student's."""
    teacher = {"kind": "tests.tiny:PooledColors", "model": "colors", "grid": 3, "width": 8}
    whole = {"kind": "resampler", "heads": 2, "head_width": 4}
    tasks: dict[str, Any] = {
        "tokens": {"at": "image_tokens", "head": {"kind": "linear"}, "loss": {"cosine": 1.0, "info_nce": 0.3}},
        "images": {"at": "image_tokens", "head": whole, "loss": {"smooth_l1": 1.0}},
        "projected": {"at": "projector", "head": {"kind": "mlp"}, "loss": {"mse": 1.0}},
        "own": {
            "at": "image_tokens",
            "head": {"kind": "linear"},
            "loss": {"gram": 1.0},
            "target": {"kind": "projector"},
        },
    }
    return {
        "tasks": {
            name: {"target": teacher, **({} if name == "projected" else {"layers": [1, 2]}), **task}
            for name, task in tasks.items()
        }
    }


def logged(folder: Path) -> dict[str, float]:
    """The first line of a run's log."""
    first: dict[str, float] = json.loads((folder / "out" / "log.jsonl").read_text(encoding="utf-8").splitlines()[0])
    return first


@training_every_family
@pytest.mark.parametrize("stage", ["pt", "ift"])
def test_every_place_is_supervised_and_a_batch_may_be_split(family, stage, folders, tmp_path):
    for micro_batch in (4, 1):
        optimization = {
            "global_batch": 4,
            "micro_batch": micro_batch,
            "lr": 1e-3,
            "max_steps": 2,
            "precision": "float32",
        }
        more = {"distillation": supervised_at_every_place(), "optimization": optimization}
        run_stage(run_of(tmp_path / str(micro_batch), folders[family], stage, **more))
    together, apart = logged(tmp_path / "4"), logged(tmp_path / "1")
    terms = [name for name in together if "/" in name]
    places = {"tokens/1/cosine", "tokens/2/info_nce", "images/2/smooth_l1", "projected/0/mse", "own/1/gram"}
    assert places < set(terms)
    for name in ("loss", "ntp", *terms):
        # The same sums in another order: at most 1.3e-7 was seen.
        assert together[name] == pytest.approx(apart[name], rel=1e-6), name
        assert together[name] > 0
    assert (tmp_path / "4" / "out" / "distillation" / "weights.safetensors").is_file()


@pytest.mark.parametrize("family", trained(PACKED))
def test_every_place_is_supervised_in_packed_rows_too(family, folders, tmp_path):
    for packing in (False, True):
        optimization = {"global_batch": 4, "micro_batch": 4, "lr": 1e-3, "max_steps": 1, "precision": "float32"}
        more = {"distillation": supervised_at_every_place(), "optimization": {**optimization, "packing": packing}}
        run_stage(run_of(tmp_path / str(packing), folders[family], "ift", **more))
    padded, packed = logged(tmp_path / "False"), logged(tmp_path / "True")
    for name in ("loss", "ntp", *(name for name in padded if "/" in name)):
        assert padded[name] == pytest.approx(packed[name], rel=2e-6), name


def image_of(width: int, height: int) -> torch.Tensor:
    """A random image of dull colors, ``[height, width, 3]``."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(100, 130, (height, width, 3), generator=generator, dtype=torch.uint8)


def changes_by_distance(student: Any, size: tuple[int, int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """How much each image token's feature changes when a sixteenth of the image does, and how far off its place is.

    Three sixteenths are changed in turn. Distances are shares of the image, the larger of the two directions.
    """
    inputs = ModelInputs(student.processor, student.image_token_id)
    (width, height), plain = size, image_of(*size)

    @torch.no_grad()
    def features(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        images = [[Image.fromarray(pixels.numpy())]]
        made = inputs.images(images)
        found = torch.cat(list(student.model.get_image_features(**made).pooler_output)).flatten(0, -2)
        places = inputs.places(images, [len(found)], made)
        assert places is not None
        return found, places

    before, places = features(plain)
    for row, column in ((0, 0), (1, 3), (3, 2)):
        changed = plain.clone()
        changed[row * height // 4 : (row + 1) * height // 4, column * width // 4 : (column + 1) * width // 4] = 255
        change = (features(changed)[0] - before).norm(dim=1)
        yield change, (places - torch.tensor(((column + 0.5) / 4, (row + 0.5) / 4))).abs().amax(1)


# Gemma 4's small tokens mix much in its encoder: ``test_other_vlms`` tests its places without the encoder's attention.
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma4"])
@pytest.mark.parametrize("size", [(64, 32), (48, 64)])
def test_an_image_token_lies_where_its_feature_changes_with_the_image(family, size, folders):
    student = build_vlm(VlmStudent(vlm=str(folders[family])))
    for change, distance in changes_by_distance(student, size):
        assert distance[change.argmax()] <= 0.26  # within the token's own cell, of at most half the image
        assert change[distance <= 0.26].mean() > change[distance > 0.3].mean()


@training_every_family
def test_what_a_layer_predicts_is_drawn(family, folders, tmp_path):
    optimization = {"global_batch": 4, "micro_batch": 4, "lr": 1e-3, "max_steps": 1, "precision": "float32"}
    more = {"distillation": supervised_at_every_place(), "optimization": optimization}
    run_stage(run_of(tmp_path, folders[family], "ift", **more))
    found = load_pre_trained(tmp_path / "out")
    images = [Image.new("RGB", (64, 32), "red"), Image.new("RGB", (24, 48), "blue")]
    together = predict_images(found.model, images, "What?")
    assert together["tokens/2"].shape == together["projected/0"].shape == (2, 9, 8)
    for at, image in enumerate(images):
        for name, value in predict_images(found.model, [image], "What?").items():
            own = together[name][at, : value.shape[1]]  # of the student's own target: a prediction for each token
            torch.testing.assert_close(own, value[0], rtol=0, atol=2e-5)
    # A row of tiles for the image and for what is drawn of teacher and layers.
    assert look(found, images[0]).width > 3 * SIDE


OWN_ENCODER = {
    "target": {"kind": "encoder"},
    "at": "image_tokens",
    "layers": [1],
    "head": {"kind": "linear"},
    "loss": {"mse": 1.0},
}


def through_the_projector(family: str, model: Any, encoded: torch.Tensor) -> torch.Tensor:
    """What each image token's feature becomes in front of the LLM."""
    own = model.model
    if family == "gemma3":
        projector = own.multi_modal_projector
        made: torch.Tensor = projector.mm_soft_emb_norm(encoded) @ projector.mm_input_projection_weight
    elif family == "gemma4":
        made = own.embed_vision(encoded)
    elif family == "smolvlm":
        made = own.connector.modality_projection(encoded)
    elif family in ("qwen3_vl", "qwen3_5"):
        made = own.visual.merger(encoded.unflatten(1, (4, -1)).flatten(0, 1))
    else:
        made = own.multi_modal_projector(encoded)
    return made


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_5", "internvl", "smolvlm", "gemma3", "gemma4"])
def test_the_encoders_output_is_a_target_in_the_order_of_the_tokens(family, folders, rows):
    student = build_vlm(VlmStudent(vlm=str(folders[family])))
    distillation = Distillation.model_validate({"tasks": {"own": OWN_ENCODER}})
    model = build_training_model(student, Stage.IFT, distillation).eval()
    assert model.objective is not None
    model.objective.layers = (0, 1)
    seen = []
    model.objective.register_forward_pre_hook(lambda module, args: seen.append((args[0][0], args[5])))
    batch = batch_of(student, rows)
    kept = {key: batch[key] for key in FORWARD_KEYS if key in batch}
    assert model(**kept, num_tokens=10, num_images=4)["own/1/mse"] > 0
    ((entering, encoded),) = seen
    at_images = entering[batch["input_ids"] == student.image_token_id]
    made = through_the_projector(family, student.model, encoded)
    if family == "gemma3":
        at_images, made = at_images / at_images.norm(), made / made.norm()
    torch.testing.assert_close(at_images, made, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", trained(("qwen3_vl", "smolvlm")))
def test_the_encoders_output_is_predicted_however_a_batch_is_split(family, folders, tmp_path):
    for micro_batch in (4, 1):
        optimization = {"global_batch": 4, "micro_batch": micro_batch, "lr": 1e-3, "precision": "float32"}
        more = {"distillation": {"tasks": {"own": OWN_ENCODER}}, "optimization": {**optimization, "max_steps": 1}}
        run_stage(run_of(tmp_path / str(micro_batch), folders[family], "ift", **more))
    assert logged(tmp_path / "4")["own/1/mse"] == pytest.approx(logged(tmp_path / "1")["own/1/mse"], rel=1e-6)


def test_objectives_that_such_a_student_cannot_have_are_refused(folders, tmp_path):
    for family in ("llava_onevision", "qwen2_5_vl", "mistral3"):
        more = {"distillation": {"tasks": {"own": OWN_ENCODER}}}
        with pytest.raises(ConfigError, match="use target 'projector'"):
            run_stage(run_of(tmp_path / family, folders[family], "ift", **more))
    teacher = {"kind": "tests.tiny:PooledColors", "model": "colors"}
    with pytest.raises(ConfigError, match=r"have no task tokens.*set their 'at' to image_tokens"):
        run_of(
            tmp_path / "b",
            folders["gemma3"],
            "pt",
            distillation={"tasks": {"depth": {"target": teacher, "layers": [1]}}},
        )


@training_every_family
@pytest.mark.parametrize("stage", ["pt", "ift"])
def test_task_tokens_stand_behind_the_image_in_the_plain_folder_too(family, stage, folders, rows, tmp_path):
    teacher = {"kind": "tests.tiny:PooledColors", "model": "colors", "grid": 4, "width": 8}
    task = {"target": teacher, "layers": [1, 2], "head": {"heads": 2, "head_width": 4}}
    student = {"vlm": str(folders[family]), "max_pixels": None, "task_tokens": {"order": ["depth"], "per_task": 4}}
    run = run_of(tmp_path, folders[family], stage, distillation={"tasks": {"depth": task}}, student=student)
    run_stage(run)
    found = logged(tmp_path)
    assert found["depth/1/smooth_l1"] > 0 and found["depth/2/info_nce"] > 0
    made = load_student(tmp_path / "out")
    ids = made.task_token_ids["depth"]
    rows_of = made.model.get_input_embeddings().weight[ids]
    assert len(ids) == 4 and (stage == "ift" or not torch.equal(rows_of[0], rows_of[1]))
    encoder = encoder_for(made.processor)
    record = as_row("What is it?", ["a.png"])
    asked, _, spans = encoder._tokens(record, asks=True, sizes=((64, 48),))
    start, end = spans[0]
    assert [token for token in asked if token in ids] == ids == [token for token in asked[start:end] if token in ids]
    # The saved processor, as stock transformers loads it, makes the same.
    stock = AutoProcessor.from_pretrained(tmp_path / "out" / "model")
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
    text = stock.apply_chat_template([message], add_generation_prompt=True)
    inputs = stock(text=[text], images=[[Image.new("RGB", (64, 48))]], return_tensors="pt")
    assert [token for token in inputs["input_ids"][0].tolist() if token in ids] == ids


@training_every_family
@pytest.mark.parametrize("stage", ["pt", "vpt", "ift"])
def test_stages_run_in_half_precision(family, stage, folders, tmp_path):
    optimization = {"global_batch": 4, "micro_batch": 2, "lr": 1e-3, "max_steps": 1}
    more = {"distillation": supervised_at_every_place(), "optimization": optimization}
    run_stage(run_of(tmp_path, folders[family], stage, **more))
    assert 0 < logged(tmp_path)["loss"] < 20
    saved: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "out" / "model", dtype="auto")
    assert {parameter.dtype for parameter in saved.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(("stage", "parts"), [("vpt", {"freeze": ["llm"]}), ("pt", {"train": ["vision"]})])
def test_an_encoder_is_trained_in_half_precision_before_a_frozen_llm(stage, parts, folders, tmp_path):
    optimization = {"global_batch": 4, "micro_batch": 2, "lr": 1e-3, "max_steps": 1, **parts}
    run_stage(run_of(tmp_path, folders["smolvlm"], stage, optimization=optimization))
    assert 0 < logged(tmp_path)["loss"] < 20


@pytest.mark.parametrize("family", trained(("qwen3_vl", "smolvlm")))
def test_a_resumed_run_ends_with_the_same_weights(family, folders, tmp_path):
    run = run_of(tmp_path, folders[family], "ift", logging={"every": 1, "save_every": 1})
    data = run.data.model_copy(update={"group_by_length": True, "workers": 1})
    run = run.model_copy(update={"data": data})
    run_stage(run)
    weights = load_file(tmp_path / "out" / "model" / "model.safetensors")
    shutil.rmtree(tmp_path / "out" / "model")
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "checkpoint-2")
    run_stage(run, resume=True)
    again = load_file(tmp_path / "out" / "model" / "model.safetensors")
    assert weights.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in weights.items())


def test_the_recipe_in_the_docs_is_valid():
    page = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")
    recipe = page.split("```yaml\n")[1].split("```")[0]
    assert isinstance(Run.model_validate(yaml.safe_load(recipe)).student, VlmStudent)
