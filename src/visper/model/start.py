"""Loads or builds the student that a stage starts from, or only its processor."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlavaProcessor

from visper.common.errors import ConfigError
from visper.config import Engine, Geometry, Run, Stage, VlmStudent
from visper.data.images import with_geometry
from visper.model.build import build_processor, build_student
from visper.model.known import require_packable
from visper.model.student import Student, load_processor, load_student
from visper.model.vlm import build_vlm, build_vlm_processor


def starting_student(run: Run, skeleton: bool = False, **loading: Any) -> Student:
    """The student that the stage starts from: newly assembled, or that of the previous stage.

    If its LLM will be frozen in half precision, it is loaded as stored, which gives the same weights in half the memory
    (``reads_as_stored``).

    Args:
        skeleton: read no weights; parameters are on the meta device.
        loading: further options of ``load_student``, for a student of the previous stage.
    """
    device_map = "meta" if skeleton else None
    dtype: Any = "auto" if reads_as_stored(run) else torch.float32
    if isinstance(run.student, VlmStudent):
        student = build_vlm(run.student, dtype, skeleton)
    elif run.student is not None:
        return build_student(run.student, run.data.geometry, dtype, device_map)
    else:
        assert run.start_from is not None
        options = {"device_map": device_map} | loading
        student = load_student(run.start_from, revision=run.start_from_revision, **options)
    _fit_to_data(student.processor, run)
    if run.packed:
        require_packable(student.model.config)
    return student


def reads_as_stored(run: Run) -> bool:
    """Whether a student that ``run`` assembles is loaded in the precision in which it is stored, not in float32.

    Not if it trains more than PT does: bfloat16 would round small updates away.
    """
    opt = run.optimization
    return run.start_from is None and run.stage is Stage.PT and opt.precision == "bfloat16" and not opt.train


def require_positions(student: Student, max_tokens: int) -> None:
    """Checks that rows cannot be longer than the LLM's context, beyond which its output would be noise.

    Raises:
        ConfigError: ``max_tokens`` is larger than the LLM's ``max_position_embeddings``.
    """
    if student.positions is not None and max_tokens > student.positions:
        raise ConfigError(
            f"data.max_tokens is {max_tokens}, but the LLM has {student.positions} positions (max_position_embeddings "
            f"in its config.json): set data.max_tokens={student.positions} or less, which cuts longer rows, or choose "
            "an LLM with a longer context"
        )


def starting_processor(run: Run) -> Any:
    """The processor of ``starting_student``, without loading the student's weights; for inspecting data."""
    if isinstance(run.student, VlmStudent):
        processor = build_vlm_processor(run.student)
    elif run.student is not None:
        return build_processor(run.student, run.data.geometry)
    else:
        assert run.start_from is not None
        processor = load_processor(run.start_from, run.start_from_revision)
    _fit_to_data(processor, run)
    return processor


def _fit_to_data(processor: Any, run: Run) -> None:
    """Sets the run's geometry on a LLaVA's processor; other models' processors are not changed.

    Raises:
        ConfigError: a setting of the run is not supported with such a processor.
    """
    if isinstance(processor, LlavaProcessor):
        processor.image_processor = with_geometry(processor.image_processor, run.data.geometry.value)
        return
    if run.data.geometry is not Geometry.SQUASH:
        raise ConfigError(
            f"data.geometry={run.data.geometry} is not supported by {type(processor).__name__}, which sees images in "
            "their own resolution: remove it"
        )
    if run.launch.engine is Engine.ZERO3:
        raise ConfigError(
            f"launch.engine=zero3 is not supported for a student with {type(processor).__name__}: training hangs. "
            "Use launch.engine=fsdp or zero2"
        )
    if run.data.join_conversations:
        raise ConfigError(
            f"data.join_conversations is not supported for a student with {type(processor).__name__}, which has its "
            "own template and positions: set it to false, and optimization.packing or data.group_by_length to true"
        )
