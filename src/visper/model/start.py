"""The student that a stage begins with, and its processor alone."""

from __future__ import annotations

from typing import Any

import torch

from visper.common.errors import ConfigError
from visper.config import Run, Stage
from visper.data.images import with_geometry
from visper.model.build import build_processor, build_student
from visper.model.student import Student, load_processor, load_student


def starting_student(run: Run) -> Student:
    """The student that the stage starts with: assembled, or the stage before's.

    Where its LLM will be frozen in half precision it is loaded as it is stored, which gives the same weights in half
    the memory.
    """
    if run.student is not None:
        frozen_llm = run.stage is Stage.PT and run.optimization.precision == "bfloat16"
        return build_student(run.student, run.data.geometry, "auto" if frozen_llm else torch.float32)
    assert run.start_from is not None
    student = load_student(run.start_from)
    processor = student.processor
    processor.image_processor = with_geometry(processor.image_processor, run.data.geometry.value)
    return student


def require_positions(student: Student, max_tokens: int) -> None:
    """Refuses rows that may be longer than what the LLM has positions for: behind these its output is noise.

    Raises:
        ConfigError: ``max_tokens`` is more than the LLM's positions.
    """
    positions = getattr(student.model.config.text_config, "max_position_embeddings", None)
    if positions is not None and max_tokens > positions:
        raise ConfigError(
            f"data.max_tokens is {max_tokens}, but the LLM has {positions} positions (max_position_embeddings in its "
            f"config.json): set data.max_tokens={positions} or less, which cuts longer rows, or choose an LLM with a "
            "longer context"
        )


def starting_processor(run: Run) -> Any:
    """The processor of ``starting_student``, without the student's weights: for looking at data."""
    if run.student is not None:
        return build_processor(run.student, run.data.geometry)
    assert run.start_from is not None
    processor = load_processor(run.start_from)
    processor.image_processor = with_geometry(processor.image_processor, run.data.geometry.value)
    return processor
