"""The training model of a stage, and which of its parameters are trainable, in which precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from visper.common.console import Console, announce
from visper.common.errors import ConfigError
from visper.config import Distillation, Optimization, Stage
from visper.distillation import EmbeddingDistillation, check_predictor, query_rows
from visper.distillation.teachers.tasks import HasSpec
from visper.model import AddedWords, Student, TaskTokens, initial_queries
from visper.model.encoders import BATCH_NORMS
from visper.model.parts import LLM, PROJECTOR, VISION, parameters_of
from visper.training.module import TrainingModel
from visper.training.stages import (
    DISTILLATION_PARTS,
    LORA,
    TASK_TOKEN_PARTS,
    WORD_PARTS,
    apply_stage,
    check_rates,
    count_parts,
    freeze_unused_vision,
    learning_rate_of,
)


def build_training_model(
    student: Student,
    stage: Stage,
    distillation: Distillation | None = None,
    teachers: Mapping[str, HasSpec] | None = None,
    seed: int = 0,
) -> TrainingModel:
    """Student, task tokens (trainable in PT, frozen later), added words and, with ``distillation``, the objective.

    Args:
        teachers: by task, the shapes of the targets; with ``distillation``.
        seed: of the query matrices' random part.

    Raises:
        ConfigError: a layer beyond the model, a teacher that fits no predictor, a task without task tokens.
    """
    embedding = student.model.get_input_embeddings()
    ids = student.task_token_ids
    if stage is not Stage.PT:
        return TrainingModel(student, TaskTokens.frozen(ids, embedding) if ids else None)
    words = None
    if student.word_ids:
        words = AddedWords(student.word_ids, embedding, student.model.get_output_embeddings())
    objective, rows = None, {}
    if distillation is not None:
        missing = [task for task in distillation.tasks if task not in ids]
        if missing:
            raise ConfigError(f"the student has no task tokens for {missing}: its tasks are {list(ids)}")
        specs = {task: teacher.spec for task, teacher in (teachers or {}).items()}
        try:
            for task, settings in distillation.tasks.items():
                check_predictor(task, settings.predictor, specs[task], len(ids[task]))
            objective = EmbeddingDistillation.from_config(distillation, specs, student.hidden_size, student.num_layers)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        for task, settings in distillation.tasks.items():
            rows[task] = query_rows(settings.predictor, specs[task], len(ids[task]))
    if not ids:
        return TrainingModel(student, words=words)
    queries = initial_queries(student, rows, torch.Generator().manual_seed(seed))
    try:
        return TrainingModel(student, TaskTokens(ids, queries), objective, words)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def choose_trainable(model: TrainingModel, stage: Stage, optimization: Optimization, lora: bool = False) -> list[str]:
    """Applies the stage's table to what the model has; returns the encoder parameters that it froze as unused.

    Args:
        lora: whether low-rank updates of the LLM are trained in place of the LLM.

    Raises:
        ConfigError, ValueError: ``freeze`` or ``lr_overrides`` names a part that the stage does not train.
    """
    lacks: tuple[str, ...] = () if model.objective is not None else DISTILLATION_PARTS
    lacks += () if model.task_tokens is not None else TASK_TOKEN_PARTS
    lacks += ("llm.*",) if lora else ()
    adds = ((f"{LORA}.*",) if lora else ()) + (WORD_PARTS if model.words is not None else ())
    apply_stage(model, stage, lacks, optimization.freeze, adds)
    check_rates(optimization, stage, model)
    if not any(p.requires_grad for _, p in parameters_of(model.student, VISION)):
        return []
    return freeze_unused_vision(model.student, model.blank_image())


def set_trainable(model: TrainingModel, stage: Stage, optimization: Optimization, lora: bool, console: Console) -> None:
    """Applies the stage's table, reports it, and casts frozen parts to the run's precision."""
    unused = choose_trainable(model, stage, optimization, lora)
    if unused:
        announce(console, "frozen", f"{len(unused)} encoder parameters behind the layer the projector reads")
    for count in count_parts(model):
        if count.total:
            rate = f" at {learning_rate_of(optimization, count.part):g}" if count.trainable else ""
            announce(console, "trainable", f"{count.part}: {count.trainable:,} of {count.total:,} parameters{rate}")
    if optimization.precision == "bfloat16":
        # Trainable weights stay in float32 under autocast; parts that are completely frozen are only read.
        frozen = [count.part for count in count_parts(model) if not count.trainable]
        to_bfloat16(model.student, [part for part in (VISION, PROJECTOR, LLM) if part in frozen])


def to_bfloat16(student: nn.Module, parts: Sequence[str] = (VISION, PROJECTOR, LLM)) -> None:
    """Casts the weights of ``parts``, but not batch normalization's: its statistics are sums that half precision rounds
    away."""
    kept = {id(p) for m in student.modules() if isinstance(m, BATCH_NORMS) for p in m.parameters()}
    for part in parts:
        for name, parameter in parameters_of(student, part):
            if id(parameter) not in kept and parameter.is_floating_point() and ".lora_" not in name:
                parameter.data = parameter.data.to(torch.bfloat16)
