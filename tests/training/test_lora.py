"""Low-rank updates: what learns, what is kept, what is merged, what continues."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from tests import tiny
from tests.checkpoints import tensors_of
from visper.common.console import Console
from visper.common.errors import ConfigError
from visper.config import Geometry, Run
from visper.data.images import geometry_of
from visper.model.student import load_processor
from visper.training import run_stage
from visper.training.run import build_student
from visper.training.trainer import StageTrainer

peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return tiny.write_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def start(tmp_path_factory, tiny_llm, tiny_encoder, rows):
    """A student to fine-tune: the output of two steps of PT."""
    out = tmp_path_factory.mktemp("start") / "pt"
    run_stage(settings(rows, out, stage="pt", student={"llm": str(tiny_llm), "encoder": str(tiny_encoder)}))
    return out


def settings(rows, out, **changes):
    return Run.model_validate(
        {
            "name": Path(out).name,
            "stage": "ift",
            "output": str(out),
            "data": {"sources": [{"json": str(rows / "rows.json"), "images": str(rows / "images")}], "workers": 0},
            "optimization": {
                "global_batch": 4,
                "micro_batch": 2,
                "lr": 1e-2,
                "max_steps": 4,
                "precision": "float32",
                "schedule": "constant_with_warmup",
                "warmup_ratio": 0,
            },
            "logging": {"every": 1, "save_every": 2},
            **changes,
        }
    )


LORA = {"rank": 4, "alpha": 8}


@pytest.fixture(scope="module")
def tuned(start, rows, tmp_path_factory):
    """The output of a fine-tuning with low-rank updates."""
    out = tmp_path_factory.mktemp("tuned") / "ift"
    run_stage(settings(rows, out, start_from=str(start), lora=LORA))
    return out


def logits(model, rows):
    pixels = torch.ones(1, 3, 16, 16)
    ids = torch.tensor([[1, *[model.config.image_token_id] * 16, 40, 41, 42]])
    with torch.no_grad():
        return model.eval()(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)).logits


def test_the_finished_folder_is_plain_llava_with_the_updates_in_it(tuned, start, rows):
    merged = load_file(tuned / "model" / "model.safetensors")
    before = load_file(start / "model" / "model.safetensors")
    assert merged.keys() == before.keys()
    changed = {name for name, value in merged.items() if not torch.equal(value, before[name])}
    assert any("q_proj" in name for name in changed) and not any("embed_tokens" in name for name in changed)
    assert all("multi_modal_projector" in name or "language_model" in name for name in changed)


def test_the_adapter_on_the_start_gives_what_the_merged_folder_gives(tuned, start, rows):
    merged = logits(LlavaForConditionalGeneration.from_pretrained(tuned / "model"), rows)
    base = LlavaForConditionalGeneration.from_pretrained(start / "model")
    plain = logits(base, rows)
    adapted = logits(peft.PeftModel.from_pretrained(base, tuned / "adapter"), rows)
    torch.testing.assert_close(adapted, merged, rtol=1e-4, atol=1e-5)
    assert (merged - plain).abs().max() > 1e-3


def test_checkpoints_hold_the_updates_and_the_projector_alone(tuned):
    saved = tensors_of(tuned / "checkpoints" / "checkpoint-4", "weights")
    assert saved and all(".lora_" in name or "multi_modal_projector" in name for name in saved)


def test_resume_continues_bit_for_bit(tuned, start, rows, tmp_path, monkeypatch):
    run = settings(rows, tmp_path / "ift", start_from=str(start), lora=LORA)
    steps = StageTrainer.training_step

    def cut(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise InterruptedError
        return steps(self, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "training_step", cut)
    with pytest.raises(InterruptedError):
        run_stage(run)
    monkeypatch.undo()
    run_stage(run, resume=True)
    whole, continued = (load_file(out / "model" / "model.safetensors") for out in (tuned, tmp_path / "ift"))
    assert all(torch.equal(value, continued[name]) for name, value in whole.items())


@pytest.mark.parametrize("stage", ["pt", "vpt"])
def test_it_is_refused_where_it_has_no_meaning(rows, stage):
    with pytest.raises(ValueError, match="'lora' belongs to stage 'ift'"):
        settings(rows, "x", stage=stage, start_from="y", lora=LORA)


def test_a_target_that_is_no_linear_layer_is_named(rows, start, tmp_path):
    run = settings(rows, tmp_path / "x", start_from=str(start), lora={"targets": ["q_porj"]})
    with pytest.raises(ConfigError, match=r"q_porj.*down_proj.*q_proj"):
        run_stage(run)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
def test_quantization_says_what_it_needs(rows, start, tmp_path):
    with pytest.raises(ConfigError, match=r"visper-lm\[qlora\]|CUDA GPU"):
        run_stage(settings(rows, tmp_path / "x", start_from=str(start), lora={"quantize": "4bit"}))


def test_a_quantized_student_sees_images_as_the_run_says(rows, start, tmp_path, monkeypatch):
    monkeypatch.setattr("visper.training.run.four_bits", lambda start_from: {})
    run = settings(rows, tmp_path / "x", start_from=str(start), lora={**LORA, "quantize": "4bit"})
    run = run.model_copy(update={"data": run.data.model_copy(update={"geometry": Geometry.PAD})})
    student = build_student(run, SimpleNamespace(num_processes=1), Console(quiet=True))
    before = load_processor(str(start)).image_processor
    assert geometry_of(before) != "pad" == geometry_of(student.processor.image_processor)


@pytest.mark.parametrize(
    "changes",
    [{"train": ["vision"]}, {"distillation": tiny.distillation()}],
    ids=["encoder", "task tokens"],
)
def test_a_quantized_students_folder_has_all_that_was_trained(changes, rows, start, tmp_path, monkeypatch):
    """Without quantizing, so that the result is that of a run that does not quantize."""
    monkeypatch.setattr("visper.training.run.four_bits", lambda start_from: {})
    found, before = [], load_file(start / "model" / "model.safetensors")
    for name, quantize in (("plain", None), ("quantized", "4bit")):
        lora, distillation = {**LORA, "quantize": quantize}, changes.get("distillation")
        run = settings(rows, tmp_path / name, start_from=str(start), lora=lora, distillation=distillation)
        trained = run.optimization.model_copy(update={"train": tuple(changes.get("train", ()))})
        run_stage(run.model_copy(update={"optimization": trained}))
        found.append(load_file(tmp_path / name / "model" / "model.safetensors"))
    plain, quantized = found
    changed = "vision_tower" if "train" in changes else "embed_tokens"
    assert any(changed in name and not torch.equal(value, before[name]) for name, value in plain.items())
    assert plain.keys() == quantized.keys()
    assert [name for name, value in plain.items() if not torch.equal(value, quantized[name])] == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_quantized_fine_tuning_leaves_a_plain_folder(rows, start, tmp_path):
    pytest.importorskip("bitsandbytes")
    run = settings(rows, tmp_path / "q", start_from=str(start), lora={**LORA, "quantize": "4bit"})
    run_stage(run)
    merged = load_file(tmp_path / "q" / "model" / "model.safetensors")
    assert merged.keys() == load_file(start / "model" / "model.safetensors").keys()


def test_each_part_has_its_own_rate_and_it_is_logged(rows, start, tmp_path):
    opt = {"global_batch": 4, "micro_batch": 4, "lr": 1e-3, "lr_overrides": {"projector": 1e-2}, "max_steps": 2}
    opt |= {"precision": "float32", "schedule": "constant_with_warmup", "warmup_ratio": 0}
    run_stage(settings(rows, tmp_path / "r", start_from=str(start), optimization=opt))
    first = json.loads((tmp_path / "r" / "log.jsonl").read_text().splitlines()[0])
    assert (first["lr_projector"], first["lr_llm"]) == (1e-2, 1e-3)
    before, after = (load_file(out / "model" / "model.safetensors") for out in (start, tmp_path / "r"))
    moved = {name: float((after[name] - value).abs().max()) for name, value in before.items()}
    projector = max(step for name, step in moved.items() if "multi_modal_projector" in name)
    llm = max(step for name, step in moved.items() if "language_model" in name)
    assert projector == pytest.approx(2e-2, rel=0.1) and llm == pytest.approx(2e-3, rel=0.1)  # Adam's first steps


def test_a_logged_rate_is_the_one_that_the_step_used(rows, start, tmp_path):
    rates = {"lr": 1e-3, "lr_overrides": {"projector": 1e-2}, "schedule": "linear", "warmup_ratio": 0.5}
    opt = {"global_batch": 4, "micro_batch": 4, "max_steps": 4, "precision": "float32", **rates}
    run_stage(settings(rows, tmp_path / "r", start_from=str(start), optimization=opt))
    logs = [json.loads(line) for line in (tmp_path / "r" / "log.jsonl").read_text().splitlines()]
    logs = [log for log in logs if "loss" in log]
    assert [log["learning_rate"] for log in logs] == pytest.approx([0, 5e-4, 1e-3, 5e-4])
    assert [log["lr_llm"] for log in logs] == [log["learning_rate"] for log in logs]
    assert [log["lr_projector"] for log in logs] == pytest.approx([10 * log["learning_rate"] for log in logs])


def test_a_rate_for_what_does_not_learn_is_refused(rows, start, tmp_path):
    opt = {"global_batch": 4, "micro_batch": 4, "lr": 1e-3, "lr_overrides": {"projektor": 1e-2}, "precision": "float32"}
    with pytest.raises(ConfigError, match="did you mean 'projector'"):
        run_stage(settings(rows, tmp_path / "r", start_from=str(start), optimization=opt))
