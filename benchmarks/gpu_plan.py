"""The planner's estimates for the steps that ``gpu_check.py`` measures, with the same model and batch.

They use the planner's own trace (``planning.fake_step``) and teacher sizes, but the rows of the timed steps. So any
difference from the measured peak is an error of the planner and not due to different rows.
"""

from __future__ import annotations

from typing import Any

import torch
from gpu_steps import Setting, tuned_with_updates, tuning_batches
from pretraining_step import TASKS, build_model, random_batch

from visper.config import Run, load_run
from visper.distillation import Targets
from visper.planning.fake_step import FakeTensorMode, adamw, fake_parameters, state_of, step_activations
from visper.planning.teachers import measure_teachers
from visper.training.module import FORWARD_KEYS, TrainingModel

RECIPE = "llama3-8b-vit-l/pt"


def planned_pre_training(setting: Setting, live: bool) -> dict[str, float]:
    """Bytes of a PT step by what holds them, and their sum as ``peak``, without the driver's."""
    run = planned_run(setting)
    model = build_model(setting.geometry, "meta", setting.dtype, setting.recomputed)
    batch, fake = random_batch(setting.geometry, model, setting.micro_batch, "cpu"), new_fake()
    with fake:
        made = {
            task: torch.empty(setting.micro_batch, spec.tokens, spec.width)
            for task, spec in setting.geometry.targets.items()
        }
    images = torch.arange(setting.micro_batch)
    batch["targets"] = {task: Targets(made[task], made[task], images) for task in TASKS}
    teachers = list(measure_teachers(run, on_gpu=True)[0].values()) if live else []
    held = traced(model, batch, run, fake)
    held["targets"] = float(sum(target.nbytes for target in made.values()))
    held["teachers"] = sum(teacher.weights for teacher in teachers)
    # Teachers run before the step, when no gradients exist.
    teaching = max((teacher.activations for teacher in teachers), default=0.0) - held["gradients"]
    held["activations"] = max(held["activations"], teaching)
    return {**held, "peak": sum(held.values())}


def planned_fine_tuning(setting: Setting, packed: bool, lora: int = 0) -> dict[str, float]:
    """Bytes of an IFT step in the same form, for the largest of the timed batches."""
    model = tuned_with_updates(setting, lora)
    batches = tuning_batches(setting, model, packed)
    largest = max(batches, key=lambda batch: batch["labels"].numel())
    batch = {key: largest[key] for key in FORWARD_KEYS if key in largest}
    held = traced(model, {**batch, "num_tokens": 1}, planned_run(setting), new_fake())
    return {**held, "peak": sum(held.values())}


def planned_run(setting: Setting) -> Run:
    """A run with this precision and these teachers, without gradient clipping, as in the timed steps."""
    precision = "bfloat16" if setting.half else "float32"
    changes = ["optimization.max_grad_norm=0", f"optimization.micro_batch={setting.micro_batch}"]
    return load_run(RECIPE, [*changes, f"optimization.precision={precision}"])


def new_fake() -> FakeTensorMode:
    """The mode that makes tensors without values."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def traced(model: TrainingModel, batch: dict[str, Any], run: Run, fake: FakeTensorMode) -> dict[str, float]:
    """Bytes of one step of ``model``, whose parameters are on the meta device, on ``batch``."""
    fake_parameters(model, fake)
    with fake:
        pixels = torch.empty(batch["pixel_values"].shape)
    optimizer = adamw(model)
    activations = step_activations(model, optimizer, {**batch, "pixel_values": pixels}, run, fake)
    return {
        "weights": float(sum(held.nbytes for held in (*model.parameters(), *model.buffers()))),
        "gradients": float(sum(p.nbytes for p in model.parameters() if p.requires_grad)),
        "optimizer": float(sum(value.nbytes for value in state_of(optimizer))),
        "activations": activations,
    }
