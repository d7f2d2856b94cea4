"""Loads the teachers of a run's tasks, or only the shapes of their targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from PIL import Image

from visper.common.errors import ConfigError
from visper.config import Distillation
from visper.config.kinds import TEACHERS
from visper.distillation.heads import check_head_fits
from visper.distillation.teachers import build_teacher, target_spec
from visper.distillation.teachers.base import TargetSpec, Teacher

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def teacher_dtype(distillation: Distillation, precision: str) -> str:
    """The precision of the teachers on this machine, a key of ``DTYPES``.

    Args:
        precision: the run's training precision, the default on a GPU.
    """
    # ONNX models and the quickstart's towers do not support half precision on the CPU.
    return distillation.teacher_dtype or (precision if torch.cuda.is_available() else "float32")


def build_teachers(
    distillation: Distillation | None,
    precision: str,
    task_token_ids: Mapping[str, Sequence[int]] | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Teacher]:
    """The frozen teachers by task; empty without ``distillation``.

    Args:
        task_token_ids: per task, the ids of its task tokens, if the student is already known.
        device: where they run.

    Raises:
        ConfigError: a teacher cannot be loaded (the message names task, kind and model), one of the user's own does not
            do what its spec says, or the task's head cannot predict its target. Raised here, before the rows of the
            data are read.
    """
    if distillation is None:
        return {}
    dtype = DTYPES[teacher_dtype(distillation, precision)]
    teachers = {}
    for task, settings in distillation.taught.items():
        teacher = settings.target
        try:
            teachers[task] = build_teacher(teacher.kind, teacher.place, **teacher.options).to(device, dtype)
            if teacher.kind not in TEACHERS:
                _try(teachers[task])
        except (OSError, ValueError, ImportError) as error:
            raise ConfigError(
                f"task '{task}': cannot load the {teacher.kind} teacher '{teacher.model}': {error}"
            ) from error
        per_task = len(task_token_ids[task]) if task_token_ids and task in task_token_ids else None
        try:
            check_head_fits(task, settings.head, teachers[task].spec, settings.at, per_task, settings.loss)
        except ValueError as error:
            raise ConfigError(str(error)) from error
    return teachers


def _try(teacher: Teacher) -> None:
    """Runs a teacher of the user's own on two images of different shapes.

    Raises:
        ValueError: it fails, its targets are not of its spec's shape, or they depend on the batch.
    """
    gray = Image.linear_gradient("L").convert("RGB")
    try:
        seen = teacher.see([gray.resize((64, 48)), gray.rotate(90).point(lambda level: level // 4).resize((48, 64))])
        target, again, twice = (teacher(one)[0].float() for one in (seen, seen, seen[[0, 0]]))
    except (AssertionError, AttributeError, IndexError, RuntimeError, TypeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"it fails on a test image (docs/teachers.md has an example): {what}") from error
    rounding = 0.01 * target.norm()  # of half precision
    if (target - again).norm() <= rounding < (target - twice).norm():  # one that samples differs each time
        raise ValueError(
            "an image's target depends on the other images of its batch, which change with its size: encode each "
            "image alone, or compute joint targets beforehand (docs/targets.md)"
        )


def specs_of(teachers: Mapping[str, Teacher]) -> dict[str, TargetSpec]:
    """The shape of each task's target."""
    return {task: teacher.spec for task, teacher in teachers.items()}


def planned_specs(distillation: Distillation | None) -> dict[str, TargetSpec]:
    """The shape of each task's target, read from a configuration if the kind of teacher supports it.

    Raises:
        ConfigError: a teacher's configuration cannot be loaded; the message names task, kind and model.
    """
    specs = {}
    for task, settings in (distillation.taught if distillation else {}).items():
        teacher = settings.target
        try:
            specs[task] = target_spec(teacher.kind, teacher.place, **teacher.options)
        except (OSError, ValueError, ImportError) as error:
            raise ConfigError(f"task '{task}': {teacher.kind} teacher '{teacher.model}': {error}") from error
    return specs
