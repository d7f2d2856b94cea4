"""The steps that ``gpu_check.py`` times: pre-training, with live or stored targets; fine-tuning, padded or packed.

Weights are random. PT's rows have the same length (see pretraining_step.py), fine-tuning's have mixed lengths (see
packing.py). Fine-tuning holds weights, gradients and AdamW's two moments of every LLM parameter in float32, 16 bytes
per parameter. The LLM is cut to ``layers`` so that this fits; the cost of a layer does not depend on their number.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import loader
import packing
import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from pretraining_step import Geometry, Stopwatch, build_model, measure, operations, published_teachers
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from visper.config import Lora, Stage
from visper.data.collator import Collator, Sample
from visper.data.packing import PackingCollator
from visper.distillation import Teacher
from visper.model import Student
from visper.training.attention import separate_samples
from visper.training.compilation import compile_parts
from visper.training.flops import FlopMeter, can_count
from visper.training.lora import add_updates
from visper.training.module import FORWARD_KEYS, TrainingModel
from visper.training.stages import TASK_TOKEN_PARTS, apply_stage

Case = dict[str, Any]
WARMING = 3
"""Untimed steps at the start: one counts FLOPs operation by operation, and two may compile."""


@dataclass(frozen=True)
class Setting:
    """The settings of a step.

    Attributes:
        geometry: one of ``pretraining_step.GEOMETRIES``.
        micro_batch, steps: rows per step; number of timed steps.
        device: "cuda", "cpu", or "meta" for planning.
        half: frozen weights are in bfloat16, under autocast.
        layers: layers of the LLM in fine-tuning; None: all.
        recomputed: share of layers whose activations are recomputed.
        peak: the device's FLOPs per second; None if unknown.
        attention: the LLM's attention in fine-tuning.
        compiled: decoder layers and predictors are compiled (``optimization.compile``).
        fused: one of ``FUSED``, a fused kernel for the loss of the answers; None: the loss of training.
    """

    geometry: Geometry
    micro_batch: int
    steps: int
    device: str
    half: bool
    layers: int | None = None
    recomputed: float = 1.0
    peak: float | None = None
    attention: str = "sdpa"
    compiled: bool = False
    fused: str | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The precision of frozen weights."""
        return torch.bfloat16 if self.half else torch.float32

    def mfu(self, flops: float, seconds: float) -> float | None:
        """Model FLOPs as a share of the peak; None if the peak is unknown."""
        return None if self.peak is None else flops / seconds / self.peak


@functools.cache
def teachers_of(device: str, dtype: torch.dtype) -> dict[str, Teacher]:
    """The published teachers with random weights."""
    with tempfile.TemporaryDirectory() as folder:
        return {task: t.to(device, dtype) for task, t in published_teachers(Path(folder), dtype).items()}


@contextlib.contextmanager
def loaded_batches(setting: Setting, configuration: str) -> Iterator[Callable[[], object]]:
    """A function that waits for the next batch of training's loader, whose processes decode and resize JPEGs."""
    images, size = 32, setting.micro_batch
    with tempfile.TemporaryDirectory() as folder:
        loader.write_rows(Path(folder), images)
        loading = loader.Loading(Path(folder), configuration, "squash", images)
        count = size * (setting.steps + 2)
        rows = list(itertools.islice(itertools.cycle(range(images)), count))
        yield functools.partial(next, iter(loading.batches(size, rows, workers=8 if setting.half else 1)))


def pre_training(setting: Setting, live: bool) -> Case:
    """Times a PT step: its parts in seconds, MFU, the teachers' share, and the share of waiting for the loader."""
    geometry, device, size = setting.geometry, setting.device, setting.micro_batch
    teachers = teachers_of(device, setting.dtype) if live else {}
    model = build_model(geometry, device, setting.dtype, setting.recomputed)
    flops = operations(geometry, model, size, device)
    if setting.compiled:
        compile_parts(model, "inductor" if setting.half else "aot_eager")
    with loaded_batches(setting, "student, depth, seg, gen" if live else "student") as load:
        found = measure(geometry, model, teachers, size, setting.steps, device, load)
    share = sum(taken for part, taken in found.items() if part.startswith("teacher")) / found["step"]
    return {
        "seconds": found,
        "mfu": setting.mfu(flops, found["step"]),
        "flops": flops,
        "teachers_share": share,
        "data_wait": found["data"] / found["step"],
    }


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
    llava.model.vision_tower.to(setting.dtype)
    model = TrainingModel(Student(llava, None, {}))
    apply_stage(model, Stage.IFT, TASK_TOKEN_PARTS)
    if setting.recomputed:
        model.recompute_activations(setting.recomputed)
    return model.train()


def rows_of(geometry: Geometry, count: int) -> list[Sample]:
    """Rows of mixed length, with image tokens and vocabulary of this geometry."""
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


FUSED = ("linear_cross_entropy", "liger")
"""torch's own fused loss (2.15), and Liger's kernel, which needs a GPU."""


def fused_loss(model: TrainingModel, kind: str) -> Callable[..., Tensor]:
    """A replacement for ``next_token_loss`` that never holds the logits of all answers."""
    weight_VD = model.student.get_output_embeddings().weight
    bias_V = weight_VD.new_zeros(len(weight_VD)).index_fill_(0, model.silent_ids, float("-inf"))

    def loss(hidden_BLD: Tensor, labels_BL: Tensor, at_T: Tensor, each: bool = False) -> Tensor:
        assert not each
        states_TD, wanted_T = hidden_BLD.flatten(0, 1)[at_T], labels_BL.flatten()[at_T + 1]
        if kind == "linear_cross_entropy":
            options = nn.LinearCrossEntropyOptions()
            return F.linear_cross_entropy(
                states_TD, weight_VD, wanted_T, linear_bias=bias_V, reduction="sum", options=options
            )
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        found: Tensor = liger_fused_linear_cross_entropy(states_TD, weight_VD, wanted_T, bias_V, reduction="sum")
        return found

    return loss


def tuning_batches(setting: Setting, model: TrainingModel, packed: bool) -> list[Any]:
    """Micro-batches of mixed lengths: ``WARMING`` untimed ones, then ``steps``."""
    padded = Collator(0)
    if packed:
        separate_samples(model.student.get_decoder())
    collator = model.with_positions(PackingCollator(padded) if packed else padded)
    size = setting.micro_batch
    rows = rows_of(setting.geometry, size * (setting.steps + WARMING))
    return [collator(rows[i : i + size]) for i in range(0, len(rows), size)]


def tuned_with_updates(setting: Setting, lora: int) -> TrainingModel:
    """A student whose frozen LLM has updates of rank ``lora``; 0: a student with a trainable LLM."""
    model = tuned_model(setting)
    if lora:
        model.student.get_decoder().to(setting.dtype)
        with torch.device(setting.device):
            add_updates(Lora.model_validate({"rank": lora}), Student(model.student, None, {}))
        apply_stage(model, Stage.IFT, ("llm.*", *TASK_TOKEN_PARTS), adds=("lora.*",))
        for parameter in model.parameters():
            parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    return model


def fine_tuning(setting: Setting, packed: bool, lora: int = 0) -> Case:
    """Times an IFT step over rows of mixed length; ``lora``: rank of the updates of a frozen half-precision LLM."""
    device, half = setting.device, setting.half
    model = tuned_with_updates(setting, lora)
    if setting.fused is not None:
        model.next_token_loss = fused_loss(model, setting.fused)  # type: ignore[method-assign]
    batches = tuning_batches(setting, model, packed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=half)
    watch, meter, counted = Stopwatch(device), FlopMeter(), can_count(model.student.get_decoder())
    if setting.compiled:
        compile_parts(model, "inductor" if half else "aot_eager")
    for number, batch in enumerate(batches):
        if number == WARMING:
            watch.parts.clear()
        with watch("step"):
            given = placed(batch, device, half)
            with (
                torch.autocast(device, torch.bfloat16, enabled=half),
                watch("forward"),
                meter.watch(model, batch["input_ids"].numel(), batch["sizes"]) if counted else contextlib.nullcontext(),
            ):
                loss = model(**given)["loss"]
            with watch("backward"):
                loss.backward()
            with watch("optimizer"):
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    assert torch.isfinite(loss)
    timed, costs = [batch["sizes"] for batch in batches[WARMING:]], meter.costs
    flops = None
    if costs is not None:
        flops = sum(costs.flops(s.tokens, s.pairs, s.supervised, s.image_tokens) for s in timed)
    seconds, real = sum(watch.parts["step"]), sum(size.tokens for size in timed)
    return {
        "loss": float(loss.detach()),
        "seconds": watch.medians(),
        "mfu": None if flops is None else setting.mfu(flops, seconds),
        "tokens_per_second": real / seconds,
        "padding_share": 1 - real / sum(batch["labels"].numel() for batch in batches[WARMING:]),
        "layers": len(model.student.get_decoder().layers),
    }


def placed(batch: Any, device: str, half: bool) -> dict[str, Any]:
    """The model's inputs, on the device."""
    given = {key: batch[key] for key in FORWARD_KEYS if key in batch}
    given = send_to_device(given, device, non_blocking=True)
    if half and "pixel_values" in given:
        given["pixel_values"] = given["pixel_values"].bfloat16()
    return given | {"num_tokens": batch["sizes"].supervised}
