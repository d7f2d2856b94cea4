"""From a run's settings to the things that train: teachers, data, training model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from rich.console import Console

from visper.config import ConfigError, Run, Stage
from visper.data.chat import ConversationEncoder
from visper.data.collator import Collator, Sample
from visper.data.dataset import ConversationDataset, Survey, keep_good, lost_images
from visper.data.lengths import measure
from visper.data.packed import PackingCollator
from visper.data.records import DataError, Drop, DropList, Record
from visper.data.sampler import RowSampler
from visper.data.sets import row_files
from visper.data.show import show_sample
from visper.data.sources import blocks_of, open_records
from visper.distillation import (
    EmbeddingDistillation,
    TargetSpec,
    Teacher,
    build_teacher,
    check_predictor,
    predictor_spec,
)
from visper.distillation.store import TargetStore
from visper.model import Student, TaskTokens, initial_queries
from visper.training.callbacks import announce
from visper.training.module import TrainingModel
from visper.training.rates import check_rates
from visper.training.stages import DISTILLATION_PARTS, LORA, TASK_TOKEN_PARTS, apply_stage, freeze_unused_vision
from visper.training.stored import require_targets

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def teacher_dtype(run: Run) -> str:
    """The precision that the run's teachers are put in on this machine."""
    assert run.distillation is not None
    # ONNX and towers know no half precision on the CPU: there the weights' own precision is kept.
    return run.distillation.teacher_dtype or (run.optimisation.precision if torch.cuda.is_available() else "float32")


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


def build_training_model(run: Run, student: Student, teachers: Mapping[str, HasSpec]) -> TrainingModel:
    """Student, task tokens (learning in PT, held still later) and, with 'distillation', the objective.

    Raises:
        ConfigError: a layer beyond the model, a teacher that fits no predictor, a task without task tokens.
    """
    embedding = student.model.get_input_embeddings()
    ids = student.task_token_ids
    if run.stage is not Stage.PT:
        return TrainingModel(student, TaskTokens.frozen(ids, embedding) if ids else None)
    objective, rows = None, {}
    if run.distillation is not None:
        missing = [task for task in run.distillation.tasks if task not in ids]
        if missing:
            raise ConfigError(f"the student has no task tokens for {missing}: its tasks are {list(ids)}")
        specs = {task: teacher.spec for task, teacher in teachers.items()}
        try:
            for task, settings in run.distillation.tasks.items():
                spec = predictor_spec(task, settings.predictor)
                check_predictor(task, spec, specs[task], len(ids[task]))
            objective = EmbeddingDistillation.from_config(
                run.distillation, specs, student.hidden_size, student.num_layers
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error
        for task, settings in run.distillation.tasks.items():
            rows[task] = predictor_spec(task, settings.predictor).query_rows(specs[task], len(ids[task]))
    if not ids:
        return TrainingModel(student)
    queries = initial_queries(student, rows, torch.Generator().manual_seed(run.seed))
    try:
        return TrainingModel(student, TaskTokens(ids, queries), objective)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def apply_run(run: Run, model: TrainingModel, student: Student) -> list[str]:
    """Applies the stage's table to what this run has, and returns the encoder parameters frozen as never reached."""
    lacks = (() if run.distillation else DISTILLATION_PARTS) + (() if student.task_token_ids else TASK_TOKEN_PARTS)
    lacks += ("llm.*",) if run.lora else ()
    apply_stage(model, run.stage, lacks, run.optimisation.freeze, (f"{LORA}.*",) if run.lora else ())
    check_rates(run, model)
    vision = student.model.model.vision_tower
    if not any(p.requires_grad for p in vision.parameters()):
        return []
    size = student.model.config.vision_config.image_size
    pixels = torch.zeros(1, 3, size, size, dtype=student.model.dtype, device=student.model.device)
    return freeze_unused_vision(student.model, vision, pixels)


@dataclass(frozen=True)
class StageData:
    """What the engine reads: rows, how they are batched, in which order; and the rows left out so far."""

    dataset: ConversationDataset
    collator: Collator | PackingCollator
    sampler: RowSampler
    drops: DropList
    num_rows: int


def build_data(
    run: Run, student: Student, teachers: Mapping[str, Teacher], console: Console, targets: TargetStore | None = None
) -> StageData:
    """Reads the run's rows, looks at each, and shows one decoded sample with what is supervised in colour.

    With stored ``targets``, the loaders read these in place of pictures for ``teachers``.

    Raises:
        DataError: a source is missing, or the share of bad rows is past ``data.drop_limit``.
    """
    settings = run.data
    drops = DropList(agreed=(drop for file in settings.drop_list for drop in DropList.read(Path(file))))
    encoder = ConversationEncoder(student.processor, settings.max_tokens)
    records, looked, total = _look(run, encoder, drops, console)
    drops.check(total, settings.drop_limit)
    if not records:
        places = [place for place, _ in row_files(settings)]
        raise DataError("no rows", f"none of the {total} rows of {places} can be used")
    if targets is not None and run.data.check_first:
        require_targets(targets, records, console.quiet)
    dataset = ConversationDataset(records, encoder, None if targets is None else targets.lookup)
    lengths = None
    if settings.group_by_length:
        lengths = looked.lengths if looked is not None else dataset.estimated_lengths()
    blocks = blocks_of(records)
    # Alike are the rows of a global batch, so that the order does not depend on how that is split; rows of shards
    # are dealt to the processes that read them, so theirs does.
    processes = PartialState().num_processes
    alike = run.optimisation.global_batch if blocks is None else run.optimisation.micro_batch * processes
    has_image = dataset.has_image if lengths else None
    batch = run.optimisation.global_batch
    sampler = RowSampler(len(dataset), run.seed, lengths, has_image, alike, blocks, processes, batch)
    preprocess = {task: teacher.preprocess for task, teacher in teachers.items()} if targets is None else {}
    padded = Collator(student.processor.tokenizer.pad_token_id, preprocess)
    collator = PackingCollator(padded) if run.optimisation.packing else padded
    left_out = "".join(f", {count} {reason}" for reason, count in drops.counts().items())
    left_out += f", {len(drops.agreed)} by drop list" if drops.agreed else ""
    cut = f"; text cut in {looked.num_truncated}" if looked is not None else ""
    announce(console, "data", f"{len(dataset)} of {total} rows{left_out}{cut}")
    _show_first(dataset, sampler, student, console)
    return StageData(dataset, collator, sampler, drops, total)


def _look(
    run: Run, encoder: ConversationEncoder, drops: DropList, console: Console
) -> tuple[Sequence[Record], Survey | None, int]:
    """The rows to train on, what the survey found, and how many rows there were.

    The first process reads, counts and looks at files; the others take what it has kept, and its word on the files.
    """
    state = PartialState()
    with state.main_process_first():
        records = open_records(row_files(run.data), drops, quiet=console.quiet)
        found = measure(records, encoder, console.quiet) if run.data.check_first else None
    total = len(records) + len(drops)
    if found is None:
        return records, None, total
    lost = broadcast_object_list([lost_images(records, found) if state.is_main_process else None])[0]
    looked = keep_good(records, found, lost, drops)
    return looked.records, looked, total


def _show_first(dataset: ConversationDataset, sampler: RowSampler, student: Student, console: Console) -> None:
    has_image = dataset.has_image
    order = sorted(sampler, key=lambda index: not has_image[index])
    for index in order:
        sample = dataset[index]
        if isinstance(sample, Drop):
            continue
        assert isinstance(sample, Sample)
        tokenizer = student.processor.tokenizer
        console.print(show_sample(tokenizer, sample.input_ids, sample.labels, student.image_token_id))
        return
    raise DataError("no rows", "not one row could be loaded: see the reasons in the drop list")
