"""What the layers of a pre-trained student predict of images.

Shape suffixes: S = images, N = teacher tokens, E = teacher width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlavaProcessor

from visper.common.errors import ConfigError
from visper.common.manifest import require_undamaged
from visper.config import Run, Stage, load_run
from visper.data.vlm import ModelInputs
from visper.distillation import Teacher
from visper.distillation.teachers.tasks import build_teachers
from visper.evaluation.ask import model_inputs
from visper.model import Student, load_student
from visper.model.student import STUDENT_FILE
from visper.training.assemble import build_training_model
from visper.training.module import TrainingModel


@dataclass(frozen=True)
class PreTrained:
    """What PT left: the run, its student with predictors and queries, and its teachers by task."""

    run: Run
    model: TrainingModel
    teachers: Mapping[str, Teacher]


def load_pre_trained(output: str | Path, overrides: Sequence[str] = (), student: Student | None = None) -> PreTrained:
    """Reads a finished PT run's folder back, in evaluation mode, on the GPU where there is one.

    Args:
        output: the folder with ``model/`` and ``distillation/``, or its ``model``.
        overrides: changes to its run, such as ``distillation.tasks.depth.target.model=elsewhere``.
        student: of a later stage, whose states the predictors read in place of their own student's.

    Raises:
        ConfigError: the folder holds no predictors, a teacher cannot be loaded, or it is not the one they learned from.
    """
    folder = _folder_of(Path(output))
    run = load_run(folder / "distillation" / "run.yaml", overrides)
    on_gpu = torch.cuda.is_available()
    half = on_gpu and run.optimization.precision == "bfloat16"
    if student is None:
        student = load_student(folder, torch.bfloat16 if half else torch.float32)
    else:
        _require_same_tokens(student, folder)
    try:
        teachers = build_teachers(run.distillation, run.optimization.precision, student.task_token_ids)
    except ConfigError as error:
        raise ConfigError(
            f"{error}\nif it lies elsewhere now: --set distillation.tasks.TASK.target.model=PLACE"
        ) from error
    model = build_training_model(student, run.stage, run.distillation, teachers, run.seed)
    require_undamaged(folder / "distillation")
    weights = load_file(folder / "distillation" / "weights.safetensors")
    needed = {name for name in model.state_dict() if name.startswith(("objective.", "task_tokens."))}
    if needed != set(weights):
        different = sorted(needed ^ set(weights))
        raise ConfigError(
            f"'{folder / 'distillation'}' was saved with other tasks, layers or predictors than its run.yaml (with "
            f"your changes) says: {len(different)} weights differ, such as '{different[0]}'"
        )
    try:
        model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise ConfigError(
            f"the predictors in '{folder / 'distillation'}' were trained with teachers of other shapes: {error}"
        ) from error
    device = "cuda" if on_gpu else "cpu"
    return PreTrained(run, model.to(device).eval(), {task: teacher.to(device) for task, teacher in teachers.items()})


def predict_images(
    model: TrainingModel, images: Sequence[Image.Image], prompt: str, batch: int = 50
) -> dict[str, Tensor]:
    """Predictions ``{"depth/20": [S, N, E]}`` (float32, CPU) of every image beside one prompt, without an answer.

    The predictors read the text too: a caption would tell them what is there.
    """
    processor = model.processor
    parts: dict[str, list[Tensor]] = {}
    for start in range(0, len(images), batch):
        chosen = list(images[start : start + batch])
        inputs = model_inputs(processor, [prompt] * len(chosen), [[image] for image in chosen])
        inputs = inputs.to(model.student.device, model.student.dtype)
        tokens = (inputs["input_ids"] == model.image_token_id).sum(1)
        places = None
        if not isinstance(processor, LlavaProcessor):
            shown = [[image] for image in chosen]
            places = ModelInputs(processor, model.image_token_id).places(shown, tokens.tolist(), inputs)
        rows = torch.arange(len(chosen), device=tokens.device)
        of_images = (rows, tokens, None, None if places is None else places.to(tokens.device))
        for name, value in model.predict(inputs, *of_images).items():
            parts.setdefault(name, []).append(value.float().cpu())
    return {name: torch.cat(values) for name, values in parts.items()}


def teacher_targets(teacher: Teacher, images: Sequence[Image.Image], batch: int = 100) -> Tensor:
    """A teacher's targets ``[S, N, E]`` (float32, CPU) of images already in the run's geometry."""
    parts = []
    for start in range(0, len(images), batch):
        pixels = torch.stack([teacher.preprocess(image) for image in images[start : start + batch]])
        parts.append(teacher(pixels).float().cpu())
    return torch.cat(parts)


def _require_same_tokens(student: Student, folder: Path) -> None:
    """Raises ConfigError unless the student has the task tokens that the predictors in ``folder`` read."""
    theirs = json.loads((folder / "model" / STUDENT_FILE).read_text(encoding="utf-8"))["task_tokens"]
    tokenizer = student.processor.tokenizer
    ours = {task: tokenizer.convert_ids_to_tokens(ids) for task, ids in student.task_token_ids.items()}
    if ours != theirs:
        raise ConfigError(
            f"the predictors in '{folder}' read task tokens of {list(theirs)}, the model has those of {list(ours)}: "
            "give the PT that it was fine-tuned from"
        )


def _folder_of(output: Path) -> Path:
    for folder in (output, output.parent):
        if (folder / "distillation" / "weights.safetensors").is_file():
            return folder
    if not output.is_dir():
        raise ConfigError(f"no folder '{output}': give the output of a finished PT run")
    hint = "give the output of a finished PT run, with its folders 'model' and 'distillation'"
    if (output / "run.yaml").is_file():
        run = load_run(output / "run.yaml")
        if run.stage is not Stage.PT:
            before = f", here perhaps '{run.start_from}'" if run.start_from else ""
            hint = f"stage '{run.stage}' keeps none, give the output of the PT before it{before}"
        elif run.distillation is None:
            hint = "this PT ran without 'distillation'"
    raise ConfigError(f"'{output}' holds no embedding predictors: {hint}")
