"""The steps that ``gpu_check.py`` times: pre-training, live or stored targets; fine-tuning, padded or packed.

Random weights. PT's rows are of one length (see pretraining_step.py), fine-tuning's of mixed length (see packing.py).
Fine-tuning holds weights, gradients and AdamW's two moments of every LLM parameter in float32, 16 bytes each: the LLM
is cut to ``layers`` so that this fits; a layer's cost does not depend on their number.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import packing
import torch
from accelerate.utils import send_to_device
from pretraining_step import Geometry, Stopwatch, build_model, measure, operations
from pretraining_step import published_teachers as published
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from visper.config import Lora, Stage
from visper.data.collator import Collator, Sample
from visper.data.packing import PackingCollator
from visper.distillation import Teacher
from visper.model import Student
from visper.training.attention import separate_samples
from visper.training.flops import FlopMeter
from visper.training.lora import add_updates
from visper.training.module import FORWARD_KEYS, TrainingModel
from visper.training.stages import TASK_TOKEN_PARTS, apply_stage

Case = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """How a step is taken.

    Attributes:
        geometry: of ``pretraining_step.GEOMETRIES``.
        micro_batch, steps: rows of a step; steps that are timed.
        layers: of the LLM in fine-tuning; None: all.
        recomputed: share of layers whose activations are computed again.
        peak: the device's FLOPs per second; None: unknown.
        attention: of the LLM in fine-tuning.
        compiled: whether decoder layers are compiled, each alone.
    """

    geometry: Geometry
    micro_batch: int
    steps: int
    device: str
    layers: int | None = None
    recomputed: float = 1.0
    peak: float | None = None
    attention: str = "sdpa"
    compiled: bool = False

    def mfu(self, flops: float, seconds: float) -> float | None:
        """Model FLOPs over what the peak allows; None where that is unknown."""
        return None if self.peak is None else flops / seconds / self.peak


def pre_training(setting: Setting, live: bool) -> Case:
    """A PT step: its parts in seconds, MFU and the teachers' share."""
    geometry, device, size = setting.geometry, setting.device, setting.micro_batch
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    teachers: dict[str, Teacher] = {}
    if live:
        with tempfile.TemporaryDirectory() as folder:
            teachers = {task: t.to(device, dtype) for task, t in published(Path(folder)).items()}
    model = build_model(geometry, device, dtype, setting.recomputed)
    flops = operations(geometry, model, size, device)
    found = measure(geometry, model, teachers, size, setting.steps, device)
    share = sum(taken for part, taken in found.items() if part.startswith("teacher")) / found["step"]
    return {"seconds": found, "mfu": setting.mfu(flops, found["step"]), "flops": flops, "teachers_share": share}


def tuned_model(setting: Setting) -> TrainingModel:
    """A student for IFT: projector and LLM in float32 under autocast, the frozen encoder in bf16 on a GPU."""
    geometry, device, attention = setting.geometry, setting.device, setting.attention
    text = geometry.llm | ({"num_hidden_layers": setting.layers} if setting.layers else {})
    vision = CLIPVisionConfig(**geometry.vision)
    config = LlavaConfig(
        text_config=LlamaConfig(**text), vision_config=vision, image_token_index=text["vocab_size"] - 1
    )
    config._attn_implementation = {"text_config": attention, "vision_config": "sdpa"}
    with torch.device(device):
        llava = LlavaForConditionalGeneration._from_config(config, dtype=torch.float32)
    if device == "cuda":
        llava.model.vision_tower.to(torch.bfloat16)
    model = TrainingModel(Student(llava, None, {}))
    apply_stage(model, Stage.IFT, TASK_TOKEN_PARTS)
    if setting.recomputed:
        model.recompute_activations(setting.recomputed)
    return model.train()


def rows_of(geometry: Geometry, count: int) -> list[Sample]:
    """Rows of mixed length with this geometry's pictures and words."""
    sizes, has_image = packing.lengths(count, 0)
    side, image_id = geometry.vision["image_size"], geometry.llm["vocab_size"] - 1
    found = []
    for number, (length, image) in enumerate(zip(sizes, has_image, strict=True)):
        row = packing.sample(number, length, image)
        ids = [image_id if token == packing.IMAGE_ID else token % (image_id - 30) for token in row.input_ids]
        labels = [label if label < 0 else label % (image_id - 30) for label in row.labels]
        found.append(
            replace(row, input_ids=ids, labels=labels, pixel_values=torch.randn(1, 3, side, side) if image else None)
        )
    return found


def fine_tuning(setting: Setting, packed: bool, lora: int = 0) -> Case:
    """An IFT step over rows of mixed length; ``lora``: rank of the updates of a frozen LLM in half precision."""
    device, half = setting.device, setting.device == "cuda"
    model = tuned_model(setting)
    if lora:
        model.student.get_decoder().to(torch.bfloat16 if half else torch.float32)
        add_updates(Lora.model_validate({"rank": lora}), Student(model.student, None, {}))
        apply_stage(model, Stage.IFT, ("llm.*", *TASK_TOKEN_PARTS), adds=("lora.*",))
    padded = Collator(0)
    if packed:
        separate_samples(model.student.get_decoder())
    collator = model.with_positions(PackingCollator(padded) if packed else padded)
    rows = rows_of(setting.geometry, setting.micro_batch * (setting.steps + 2))
    batches = [collator(rows[i : i + setting.micro_batch]) for i in range(0, len(rows), setting.micro_batch)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=half)
    watch, meter = Stopwatch(device), FlopMeter()
    for number, batch in enumerate(batches):
        if number == 1 and setting.compiled:  # the first pass is counted, operation by operation
            for layer in model.student.get_decoder().layers:
                layer.compile(backend="inductor" if half else "aot_eager")
        if number == 2:
            watch.parts.clear()
        with watch("step"):
            given = placed(batch, device, half)
            with (
                torch.autocast(device, torch.bfloat16, enabled=half),
                watch("forward"),
                meter.watch(model, batch["input_ids"].numel(), batch["sizes"]),
            ):
                loss = model(**given)["loss"]
            with watch("backward"):
                loss.backward()
            with watch("optimizer"):
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    assert torch.isfinite(loss) and meter.costs is not None
    timed = [batch["sizes"] for batch in batches[2:]]
    flops = sum(meter.costs.flops(s.tokens, s.pairs, s.supervised, s.image_tokens) for s in timed)
    seconds, real = sum(watch.parts["step"]), sum(size.tokens for size in timed)
    return {
        "loss": float(loss.detach()),
        "seconds": watch.medians(),
        "mfu": setting.mfu(flops, seconds),
        "tokens_per_second": real / seconds,
        "padding_share": 1 - real / sum(batch["labels"].numel() for batch in batches[2:]),
        "layers": len(model.student.get_decoder().layers),
    }


def placed(batch: Any, device: str, half: bool) -> dict[str, Any]:
    """What the model is given, on the device."""
    given = {key: batch[key] for key in FORWARD_KEYS if key in batch}
    given = send_to_device(given, device, non_blocking=True)
    if half and "pixel_values" in given:
        given["pixel_values"] = given["pixel_values"].bfloat16()
    return given | {"num_tokens": batch["sizes"].supervised}
