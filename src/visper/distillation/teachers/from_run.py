"""A run's teachers, by task: loaded, or only the shapes of their targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from visper.common.errors import ConfigError
from visper.config import Run
from visper.distillation.heads import check_predictor, predictor_spec
from visper.distillation.teachers import build_teacher, target_spec
from visper.distillation.teachers.base import TargetSpec, Teacher

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def teacher_dtype(run: Run) -> str:
    """The precision that the run's teachers are put in on this machine."""
    assert run.distillation is not None
    # ONNX and towers know no half precision on the CPU: there the weights' own precision is kept.
    return run.distillation.teacher_dtype or (run.optimization.precision if torch.cuda.is_available() else "float32")


def build_teachers(run: Run) -> dict[str, Teacher]:
    """The frozen teachers of a run, by task; none without 'distillation'.

    Raises:
        ConfigError: a teacher cannot be loaded (the message names task, kind and model), or fits no predictor: told
            here, before every row of the data is looked at.
    """
    if run.distillation is None:
        return {}
    tokens = run.student.task_tokens if run.student is not None else None
    per_task = tokens.per_task if tokens is not None else None
    teachers = {}
    for task, settings in run.distillation.tasks.items():
        teacher = settings.teacher
        try:
            teachers[task] = build_teacher(teacher.kind, teacher.model, **teacher.options).to(
                DTYPES[teacher_dtype(run)]
            )
        except (OSError, ValueError, ImportError) as error:
            raise ConfigError(
                f"task '{task}': cannot load the {teacher.kind} teacher '{teacher.model}': {error}"
            ) from error
        try:
            check_predictor(task, predictor_spec(task, settings.predictor), teachers[task].spec, per_task)
        except ValueError as error:
            raise ConfigError(str(error)) from error
    return teachers


class HasSpec(Protocol):
    """All that the objective must know of a teacher: the shape of its targets."""

    @property
    def spec(self) -> TargetSpec: ...


@dataclass(frozen=True)
class PlannedTeacher:
    """A teacher of which nothing is known but the shape of its targets."""

    spec: TargetSpec


def planned_teachers(run: Run) -> dict[str, PlannedTeacher]:
    """The shapes of the run's targets, by task, from configurations where the kind of teacher allows.

    Raises:
        ConfigError: a teacher's configuration cannot be had; the message names task, kind and model.
    """
    teachers = {}
    for task, settings in (run.distillation.tasks if run.distillation else {}).items():
        teacher = settings.teacher
        try:
            teachers[task] = PlannedTeacher(target_spec(teacher.kind, teacher.model, **teacher.options))
        except (OSError, ValueError, ImportError) as error:
            raise ConfigError(f"task '{task}': {teacher.kind} teacher '{teacher.model}': {error}") from error
    return teachers
