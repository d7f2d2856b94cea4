"""From a run's settings to the things that train: teachers, data, training model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from rich.console import Console

from visper.common.console import announce
from visper.common.errors import ConfigError, DataError
from visper.config import Run, Stage
from visper.data.chat import ConversationEncoder
from visper.data.checks.unknown_words import sampled_unknown_words, unknown_words
from visper.data.collator import Collator, Sample
from visper.data.dataset import ConversationDataset, Survey, keep_good, lost_images, require_images
from visper.data.packing import PackingCollator
from visper.data.rows.lengths import measure
from visper.data.rows.records import Drop, DropList, Record
from visper.data.rows.sources import mixture_of, open_records
from visper.data.sampler import RowSampler
from visper.data.sets.catalog import row_files
from visper.data.show import show_sample
from visper.distillation import (
    EmbeddingDistillation,
    Teacher,
    check_predictor,
    query_rows,
)
from visper.distillation.teachers.tasks import HasSpec
from visper.model import Student, TaskTokens, initial_queries
from visper.target_store.open import TargetStore, require_targets
from visper.training.module import TrainingModel
from visper.training.rates import check_rates
from visper.training.stages import DISTILLATION_PARTS, LORA, TASK_TOKEN_PARTS, apply_stage, freeze_unused_vision


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
                check_predictor(task, settings.predictor, specs[task], len(ids[task]))
            objective = EmbeddingDistillation.from_config(
                run.distillation, specs, student.hidden_size, student.num_layers
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error
        for task, settings in run.distillation.tasks.items():
            rows[task] = query_rows(settings.predictor, specs[task], len(ids[task]))
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
    apply_stage(model, run.stage, lacks, run.optimization.freeze, (f"{LORA}.*",) if run.lora else ())
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
    """Reads the run's rows, looks at each, and shows one decoded sample with what is supervised in color.

    With stored ``targets``, the loaders read these in place of pictures for ``teachers``.

    Raises:
        DataError: a source is missing, the share of bad rows is past ``data.drop_limit``, or that of words which the
            tokenizer does not know past ``data.unknown_limit``.
    """
    settings = run.data
    drops = DropList(agreed=(drop for file in settings.drop_list for drop in DropList.read(Path(file))))
    encoder = ConversationEncoder(student.processor, settings.max_tokens)
    records, looked, total = _look(run, encoder, drops, console)
    drops.check(total, settings.drop_limit)
    if not records:
        places = [source.place for source in row_files(settings)]
        raise DataError("no rows", f"none of the {total} rows of {places} can be used")
    if run.stage is Stage.PT:
        require_images(records)
    _check_words(run, records, looked, encoder, console)
    if targets is not None and run.data.check_first:
        require_targets(targets, records, console.quiet)
    dataset = ConversationDataset(records, encoder, None if targets is None else targets.lookup)
    lengths = None
    if settings.group_by_length:
        lengths = looked.lengths if looked is not None else dataset.estimated_lengths()
    has_image = dataset.has_image if lengths else None
    batch, mixture = run.optimization.global_batch, mixture_of(records)
    sampler = RowSampler(len(dataset), run.seed, lengths, has_image, batch, mixture)
    preprocess = {task: teacher.preprocess for task, teacher in teachers.items()} if targets is None else {}
    padded = Collator(student.processor.tokenizer.pad_token_id, preprocess)
    collator = PackingCollator(padded) if run.optimization.packing else padded
    left_out = "".join(f", {count} {reason}" for reason, count in drops.counts().items())
    left_out += f", {len(drops.agreed)} by drop list" if drops.agreed else ""
    cut = f"; text cut in {looked.num_truncated}" if looked is not None else ""
    announce(console, "data", f"{len(dataset)} of {total} rows{left_out}{cut}")
    if mixture is not None:
        parts = zip(mixture.sizes, mixture.weights, mixture.counts, strict=True)
        shown = ", ".join(f"{size} rows x {weight:g} = {count}" for size, weight, count in parts)
        announce(console, "mixture", f"{shown}: {sampler.epoch_rows} rows an epoch")
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


def _check_words(
    run: Run, records: Sequence[Record], looked: Survey | None, encoder: ConversationEncoder, console: Console
) -> None:
    if looked is None:
        unknown = sampled_unknown_words(records, encoder)
    else:
        unknown = unknown_words(records, looked.num_text, looked.num_unknown, encoder)
    warning = unknown.check(run.data.unknown_limit)
    if warning is not None:
        announce(console, "warning", warning)


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
