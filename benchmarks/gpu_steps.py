"""One call for one GPU: pre-training with live teachers and with stored targets, fine-tuning padded and packed.

    python benchmarks/gpu_steps.py llama3-8b --out benchmarks/results/gpu-steps.json     # one 80 GB GPU or larger
    python benchmarks/gpu_steps.py tiny --micro-batch 2 --steps 1                        # a dry run on the CPU

Random weights. PT's rows are of one length (see pretraining_step.py), fine-tuning's of mixed length (see packing.py).
Fine-tuning holds weights, gradients and AdamW's two moments of every LLM parameter in float32, 16 bytes each: with
``--ift-layers`` the LLM is cut to so many layers that this fits; a layer's cost does not depend on their number.

Utilization: operations of forward and backward on tokens that are no padding, as torch's counter finds them for one
row (recomputation not counted), over step seconds x ``--peak``. For fine-tuning the count is scaled by tokens.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import packing
import torch
import transformers
from pretraining_step import GEOMETRIES, Geometry, Stopwatch, build_model, measure, operations, peak_gib
from pretraining_step import published_teachers as published
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from visper.config import Stage
from visper.data.collator import Collator, Sample
from visper.data.packing import PackingCollator
from visper.distillation import Teacher
from visper.model import Student
from visper.training.attention import separate_samples
from visper.training.module import TrainingModel
from visper.training.stages import TASK_TOKEN_PARTS, apply_stage
from visper.training.trainer import FORWARD_KEYS

Case = dict[str, Any]


def pre_training(geometry: Geometry, live: bool, options: argparse.Namespace, device: str) -> Case:
    """A PT step: its parts in seconds, utilization and the teachers' share."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    teachers: dict[str, Teacher] = {}
    if live:
        with tempfile.TemporaryDirectory() as folder:
            teachers = {task: t.to(device, dtype) for task, t in published(Path(folder)).items()}
    counted = operations(geometry, build_model(geometry, device, dtype, 0.0), device)
    model = build_model(geometry, device, dtype, 1.0)
    found = measure(geometry, model, teachers, options.micro_batch, options.steps, device)
    used = counted * options.micro_batch / found["step"] / options.peak
    share = sum(taken for part, taken in found.items() if part.startswith("teacher")) / found["step"]
    return {"seconds": found, "utilization": used, "teachers_share": share}


def tuned_model(geometry: Geometry, layers: int | None, attention: str, device: str) -> TrainingModel:
    """A student for IFT: projector and LLM in float32 under autocast, the frozen encoder in bf16 on a GPU."""
    text = geometry.llm | ({"num_hidden_layers": layers} if layers else {})
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
    model.recompute_activations()
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


def fine_tuning(geometry: Geometry, packed: bool, options: argparse.Namespace, device: str) -> Case:
    """An IFT step over rows of mixed length."""
    model = tuned_model(geometry, options.ift_layers, options.attention, device)
    padded = Collator(0)
    collator: Collator | PackingCollator = padded
    if packed:
        separate_samples(model.student.model.language_model)
        collator = PackingCollator(padded)
    rows = rows_of(geometry, options.micro_batch * (options.steps + 2))
    batches = [collator(rows[i : i + options.micro_batch]) for i in range(0, len(rows), options.micro_batch)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=device == "cuda")
    watch, half = Stopwatch(device), device == "cuda"
    real: list[int] = []
    operated: list[int] = []
    per_token = row_operations(model, padded([row for row in rows if row.pixel_values is not None][:1]), device)
    for number, batch in enumerate(batches):
        if number == 2:
            watch.parts.clear()
            real, operated = [], []
        real.append(int(batch["attention_mask"].sum()))
        operated.append(batch["labels"].numel())
        with watch("step"):
            given = placed(batch, device, half)
            with torch.autocast(device, torch.bfloat16, enabled=half), watch("forward"):
                loss = model(**given)["loss"]
            with watch("backward"):
                loss.backward()
            with watch("optimizer"):
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    assert torch.isfinite(loss)
    seconds = sum(watch.parts["step"])
    return {
        "seconds": watch.medians(),
        "utilization": per_token * sum(real) / seconds / options.peak,
        "tokens_per_second": sum(real) / seconds,
        "padding_share": 1 - sum(real) / sum(operated),
        "layers": options.ift_layers or geometry.llm["num_hidden_layers"],
    }


def placed(batch: Any, device: str, half: bool) -> dict[str, Any]:
    """What the model is given, on the device."""
    given = {key: batch[key] for key in FORWARD_KEYS if key in batch}
    given = {key: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for key, v in given.items()}
    if half and "pixel_values" in given:
        given["pixel_values"] = given["pixel_values"].bfloat16()
    return given | {"num_tokens": int((batch["labels"][:, 1:] != -100).sum())}


def row_operations(model: nn.Module, batch: Any, device: str) -> float:
    """Operations a token of one row's forward and backward: three forwards, none recomputed."""
    half = device == "cuda"
    precision = torch.autocast(device, torch.bfloat16, enabled=half)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), precision:
        model(**placed(batch, device, half))
    return 3.0 * counter.get_total_flops() / batch["labels"].numel()


def main() -> None:
    """Runs the cases one after the other and prints one JSON object."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("geometry", choices=GEOMETRIES)
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--ift-layers", type=int, help="layers of the LLM in fine-tuning; default: all")
    parser.add_argument("--attention", default="sdpa", help="of fine-tuning: sdpa, flex_attention, flash_attention_2")
    parser.add_argument("--cases", nargs="+", help="some of them only")
    parser.add_argument("--peak", type=float, default=989e12, help="the device's bf16 operations a second (H100, H200)")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    geometry = GEOMETRIES[options.geometry]
    cases: dict[str, Callable[[], Case]] = {
        "pt stored targets": lambda: pre_training(geometry, False, options, device),
        "pt live teachers": lambda: pre_training(geometry, True, options, device),
        "ift padded": lambda: fine_tuning(geometry, False, options, device),
        "ift packed": lambda: fine_tuning(geometry, True, options, device),
    }
    if options.geometry == "tiny":
        del cases["pt live teachers"]  # the published teachers fit no tiny target
    report: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "machine": torch.cuda.get_device_name() if device == "cuda" else "CPU, one thread: a dry run",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if device == "cpu":
        torch.set_num_threads(1)
    for name in options.cases or cases:
        torch.manual_seed(0)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            report[name] = cases[name]() | {"peak_gib": peak_gib(device)}
        except torch.OutOfMemoryError as error:
            report[name] = {"failed": str(error).splitlines()[0]}
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        if options.out:
            options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
