"""Builds a stage's training model and sets which of its parameters are trainable, and in which precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlavaConfig

from visper.common.compat import merge_in_one_precision
from visper.common.console import Console, announce
from visper.common.errors import ConfigError, counted
from visper.config import Distillation, Optimization, Position, Stage, load_run
from visper.distillation import EmbeddingDistillation, HiddenStateTap, TargetSpec, check_head_fits, query_rows
from visper.model import AddedWords, Student, TaskTokens, initial_queries
from visper.model.encoders import BATCH_NORMS
from visper.model.parts import ENCODED, LLM, PROJECTOR, VISION, parameters_of
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
    tasks_without_influence,
)


def build_training_model(
    student: Student,
    stage: Stage,
    distillation: Distillation | None = None,
    specs: Mapping[str, TargetSpec] | None = None,
    seed: int = 0,
) -> TrainingModel:
    """Combines student, task tokens, added words (in PT) and, with ``distillation``, the objective.

    Args:
        specs: shape of the targets of each task with a teacher; needed with ``distillation``.
        seed: for the random initialization of the query matrices.

    Raises:
        ConfigError: a task names a layer that the model does not have, a target that its head cannot predict, or task
            tokens that the student lacks.
    """
    embedding = student.model.get_input_embeddings()
    words = None
    if student.word_ids and stage is Stage.PT:
        words = AddedWords(student.word_ids, embedding, student.model.get_output_embeddings())
    try:
        objective, rows = None, dict[str, int]()
        if distillation is not None:
            objective, rows = _objective(student, distillation, dict(specs or {}))
        return TrainingModel(student, _task_tokens(student, stage, rows, seed), objective, words)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _objective(
    student: Student, distillation: Distillation, specs: dict[str, TargetSpec]
) -> tuple[EmbeddingDistillation, dict[str, int]]:
    """The embedding losses, and the number of query matrix rows of each task that reads task tokens."""
    ids = student.task_token_ids
    missing = [task for task in distillation.at_task_tokens if task not in ids]
    if missing:
        raise ConfigError(
            f"the student has no task tokens for {missing}, only for {list(ids)}: supervise {missing} at image_tokens"
        )
    for task, settings in distillation.tasks.items():
        by_place = settings.at is not Position.TASK_TOKENS and settings.head.kind != "resampler"
        if by_place and not settings.target.own and not student.knows_places:
            raise ConfigError(
                f"task '{task}': the target cannot be resampled to the {student.num_image_tokens} image tokens, as "
                "their positions in the image are not known: set head.kind to resampler"
            )
        if settings.target.own:
            specs[task] = own_target(student, settings.target.kind)
        per_task = len(ids.get(task, ())) or None
        check_head_fits(task, settings.head, specs[task], settings.at, per_task, settings.loss)
    counts = {student.num_image_tokens, *map(len, ids.values())} if student.is_llava else ()  # else they differ
    objective = EmbeddingDistillation.from_config(distillation, specs, student.hidden_size, student.num_layers, counts)
    HiddenStateTap(student.model.get_decoder(), objective.layers)  # raises if a layer cannot be tapped
    tasks = {task: distillation.tasks[task] for task in distillation.at_task_tokens}
    return objective, {task: query_rows(own.head, specs[task], len(ids[task])) for task, own in tasks.items()}


def own_target(student: Student, kind: str) -> TargetSpec:
    """The spec of a target taken from the student itself; ``kind`` is "encoder" or "projector"."""
    width = student.hidden_size
    if kind == "encoder":
        kept = ENCODED.get(student.model.config.model_type)
        if kept is None:
            raise ConfigError(
                f"target 'encoder' is not supported by models of type '{student.model.config.model_type}', only by "
                f"{', '.join(ENCODED)}, whose encoder features are in the order of the image tokens: use target "
                "'projector'"
            )
        width = kept.width(student.model.get_submodule(kept.module))
    return TargetSpec(student.num_image_tokens, width, own=True)


def _task_tokens(student: Student, stage: Stage, rows: Mapping[str, int], seed: int) -> TaskTokens | None:
    """New task tokens in PT. Later stages take them from the vocabulary: trainable with ``rows``, frozen without."""
    ids, embedding = student.task_token_ids, student.model.get_input_embeddings()
    if not ids:
        return None
    if stage is Stage.PT:
        return TaskTokens(ids, initial_queries(student, rows, torch.Generator().manual_seed(seed)))
    return TaskTokens.of_vocabulary(ids, embedding, rows) if rows else TaskTokens.frozen(ids, embedding)


def continue_objective(model: TrainingModel, distillation: Distillation, start_from: str) -> list[str]:
    """Loads heads and queries of the previous stage for tasks whose target, head, position and layers are unchanged.

    Returns:
        The tasks that continue with trained heads; the others keep their new heads.
    """
    place = Path(start_from).parent if Path(start_from).name == "model" else Path(start_from)
    saved_run = place / "distillation" / "run.yaml"
    if not saved_run.is_file():
        return []
    before = load_run(saved_run).distillation
    assert before is not None and model.objective is not None
    state = model.state_dict()
    weights = load_file(place / "distillation" / "weights.safetensors")
    found, continued = dict[str, torch.Tensor](), list[str]()
    for name, task in distillation.tasks.items():
        old = before.tasks.get(name)
        if old is None or (old.target, old.head, old.at, old.layers) != (task.target, task.head, task.at, task.layers):
            continue
        heads = tuple(f"objective.predictors.{head}." for head in model.objective.tasks[name].head_names(name))
        if _shapes(weights, heads) != _shapes(state, heads):  # the code of the user's own head or teacher has changed
            continue
        others = (f"objective.logit_scales.{name}", f"task_tokens.queries.{name}")
        saved = {n: t for n, t in weights.items() if n.startswith(heads) or n in others}
        found |= {n: t for n, t in saved.items() if n in state and state[n].shape == t.shape}
        continued.append(name)
    model.load_state_dict(found, strict=False)
    return continued


def _shapes(weights: Mapping[str, torch.Tensor], heads: tuple[str, ...]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in weights.items() if name.startswith(heads)}


def choose_trainable(model: TrainingModel, stage: Stage, optimization: Optimization, lora: bool = False) -> list[str]:
    """Sets ``requires_grad`` by the stage's table; returns the names of encoder parameters frozen because unused.

    Args:
        lora: whether low-rank updates are trained instead of the LLM.

    Raises:
        ConfigError: a key of ``optimization`` names a part that the model or the stage does not have, or nothing is
            left to train.
    """
    held = {count.part for count in count_parts(model)}
    distills = tuple(p for p in DISTILLATION_PARTS if p.removesuffix(".*") in held)  # a head may have no parameters
    lacks = tuple(p for p in DISTILLATION_PARTS if p not in distills)
    lacks += () if model.task_tokens is not None else TASK_TOKEN_PARTS
    lacks += ("llm.*",) if lora else ()
    adds = ((f"{LORA}.*",) if lora else ()) + (WORD_PARTS if model.words is not None else ()) + distills
    adds += TASK_TOKEN_PARTS if model.trains_task_tokens else ()
    if lora and any(part.split(".")[0] == "llm" for part in optimization.train):
        raise ConfigError(
            "optimization.train names the LLM, but 'lora' trains low-rank updates of it instead: remove one of them"
        )
    try:
        apply_stage(model, stage, lacks, optimization.freeze, adds, optimization.train, model.frozen_heads())
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("this run would train nothing: remove a part from optimization.freeze")
    check_rates(optimization, stage, model)
    if not any(p.requires_grad for _, p in parameters_of(model.student, VISION)):
        return []
    return freeze_unused_vision(model.student, model.blank_image())


def set_trainable(model: TrainingModel, stage: Stage, optimization: Optimization, lora: bool, console: Console) -> None:
    """Sets what is trainable by the stage's table, logs the counts, and casts frozen parts to the run's precision."""
    unused = choose_trainable(model, stage, optimization, lora)
    if unused:
        announce(
            console, "frozen", f"{counted(len(unused), 'encoder parameter')} after the layer that the projector reads"
        )
    for count in count_parts(model):
        if count.total:
            rate = f" at {learning_rate_of(optimization, count.part):g}" if count.trainable else ""
            announce(console, "trainable", f"{count.part}: {count.trainable:,} of {count.total:,} parameters{rate}")
    objective = model.objective
    tasks = {} if objective is None else {name: task.at for name, task in objective.tasks.items()}
    for name in tasks_without_influence(model, tasks):
        text = f"task '{name}' trains only its head: all that its states at {tasks[name]} depend on is frozen"
        announce(console, "warning", f"{text} (to change that, see optimization.freeze and optimization.train)")
    if optimization.precision == "bfloat16":
        # Trainable weights stay in float32 under autocast; completely frozen parts can be in bfloat16.
        frozen = [count.part for count in count_parts(model) if not count.trainable]
        if not {VISION, LLM} <= set(frozen) and not isinstance(model.config, LlavaConfig):
            frozen = []  # SmolVLM's image features have its encoder's precision, which must equal the embeddings'
        to_bfloat16(model.student, [part for part in (VISION, PROJECTOR, LLM) if part in frozen])
        merge_in_one_precision(model.student.model)


def to_bfloat16(student: nn.Module, parts: Sequence[str] = (VISION, PROJECTOR, LLM)) -> None:
    """Casts the weights of ``parts``, except batch normalization: half precision would round its statistics away."""
    kept = {id(p) for m in student.modules() if isinstance(m, BATCH_NORMS) for p in m.parameters()}
    for part in parts:
        for name, parameter in parameters_of(student, part):
            if id(parameter) not in kept and parameter.is_floating_point() and ".lora_" not in name:
                parameter.data = parameter.data.to(torch.bfloat16)
