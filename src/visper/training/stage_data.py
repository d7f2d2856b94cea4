"""A stage's data: opens and surveys the rows, and builds dataset, sampler and collator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visper.common.console import Console, announce
from visper.common.errors import DataError
from visper.common.ranks import first_decides, first_goes_first
from visper.config import Data, Run
from visper.data.chat import ConversationEncoder
from visper.data.checks.moved_images import moved_images, require_task_tokens
from visper.data.checks.unknown_words import unknown_words
from visper.data.checks.unread_images import unread_images
from visper.data.collator import Collator, Preprocess, Sample
from visper.data.dataset import ConversationDataset, keep_good, lost_images
from visper.data.image_order import image_groups
from visper.data.images import geometry_of, output_size
from visper.data.joining import JoiningCollator
from visper.data.packing import PackingCollator
from visper.data.rows.lengths import Lengths, measure
from visper.data.rows.records import Drop, DropList
from visper.data.rows.sources import mixture_of, open_records
from visper.data.rows.table import Records
from visper.data.sampler import RowSampler
from visper.data.sets.catalog import row_files
from visper.data.show import show_sample
from visper.data.vlm import ModelInputs, encoder_for
from visper.distillation import Teacher
from visper.distillation.teachers import SquashedImage
from visper.model import Student
from visper.target_store.open import TargetStore, require_targets

AnyCollator = Collator | PackingCollator | JoiningCollator


@dataclass(frozen=True)
class StageData:
    """The data that the trainer reads, and the rows dropped so far."""

    dataset: ConversationDataset
    collator: AnyCollator
    sampler: RowSampler
    drops: DropList
    num_rows: int
    drop_limit: float = 0.01

    def drop_more(self, dropped: Sequence[Drop], file: Path | None) -> None:
        """Adds rows found bad while loading, and writes the list of dropped rows to ``file``, if given.

        Raises:
            DataError: the share of bad rows exceeds ``drop_limit``.
        """
        self.drops.extend(dropped)
        if file is not None:
            self.drops.write(file)
        self.drops.check(self.num_rows, self.drop_limit)


def build_data(
    run: Run, student: Student, teachers: Mapping[str, Teacher], targets: TargetStore | None, console: Console
) -> StageData:
    """Opens and surveys the rows of ``run.data``, and shows one decoded sample with its supervised text in color.

    Args:
        student: its processor makes tokens and pixels.
        teachers: task -> teacher, whose ``preprocess`` is used; not needed with ``targets``.
        targets: stored targets, which are loaded instead of the teachers' images.

    Raises:
        DataError: a source is missing, the share of bad rows exceeds ``data.drop_limit``, or the share of words that
            the tokenizer does not know exceeds ``data.unknown_limit``, or images lack task tokens that a task reads.
    """
    settings = run.data
    drops = DropList(agreed=(drop for file in settings.drop_list for drop in DropList.read(Path(file))))
    encoder = encoder_for(student.processor, settings.max_tokens)
    records, found, total = _surveyed_rows(settings, encoder, drops, console)
    _require_rows(settings, records, drops, total)
    for warning in [*unread_images(records), *moved_images(records, found, encoder)]:
        announce(console, "warning", warning)
    read = run.distillation.at_task_tokens if run.distillation else []
    if read:
        first = student.task_token_ids[read[0]][0]
        require_task_tokens(records, found, encoder, student.processor.tokenizer.convert_ids_to_tokens(first))
    unknown = unknown_words(records, found, encoder).check(settings.unknown_limit)
    if unknown is not None:
        announce(console, "warning", unknown)
    if targets is not None:
        require_targets(targets, records, console.quiet)
    dataset = ConversationDataset(records, encoder, None if targets is None else targets.lookup, settings.max_pixels)
    sampler = _sampler(run, dataset, found)
    preprocess = {task: teacher.preprocess for task, teacher in teachers.items()} if targets is None else {}
    collator = _collator(run, student, preprocess)
    announce(console, "data", _summary(dataset, total, drops, found))
    _announce_mixture(sampler, console)
    _announce_joined(dataset, sampler, console)
    _show_first(dataset, sampler, student, console)
    return StageData(dataset, collator, sampler, drops, total, settings.drop_limit)


def _surveyed_rows(
    settings: Data, encoder: ConversationEncoder, drops: DropList, console: Console
) -> tuple[Records, Lengths, int]:
    """The rows to train on, their lengths, and the total number of rows.

    The first process reads and measures the rows and checks the image files; the others read its cache and get the
    result of its file check.
    """
    with first_goes_first():
        records = open_records(row_files(settings), drops, quiet=console.quiet)
        found = measure(records, encoder, console.quiet)
    total = len(records) + len(drops)
    lost = first_decides(lambda: lost_images(records, found))
    return *keep_good(records, found, lost, drops), total


def _require_rows(settings: Data, records: Records, drops: DropList, total: int) -> None:
    drops.check(total, settings.drop_limit)
    if not records:
        places = ", ".join(f"'{source.place}'" for source in row_files(settings))
        why = f"none of the {total} rows can be used" if total else "the data has no rows"
        raise DataError("no rows", f"{why}: check {places} with `visper data check`")
    used = set(records.part_numbers.tolist())
    for number, part in enumerate(records.parts):
        if number not in used:  # with a wrong images folder, for example; the other sources may keep it below the limit
            raise DataError(
                "empty source",
                f"none of the {len(part.table)} rows of '{part.name}' can be used: see `visper data check`, or "
                "remove it from data.sources",
            )


def _sampler(run: Run, dataset: ConversationDataset, found: Lengths) -> RowSampler:
    lengths = found.lengths.tolist() if run.data.group_by_length else None
    has_image = dataset.records.has_image.tolist() if lengths else None
    mixture = mixture_of(dataset.records)
    groups = image_groups(dataset.records).tolist() if run.data.join_conversations else None
    batch, micro_batch = run.optimization.global_batch, run.optimization.micro_batch
    return RowSampler(len(dataset), run.seed, lengths, has_image, batch, mixture, groups, micro_batch)


def _collator(run: Run, student: Student, preprocess: Mapping[str, Preprocess]) -> AnyCollator:
    inputs = None if student.is_llava else ModelInputs(student.processor, student.image_token_id)
    shared = seen_by_student(student.processor.image_processor, preprocess) if student.is_llava else frozenset()
    padded = Collator(student.processor.tokenizer.pad_token_id, dict(preprocess), inputs, shared)
    if run.data.join_conversations:
        return JoiningCollator(padded, student.image_token_id, run.data.max_tokens)
    return PackingCollator(padded) if run.optimization.packing else padded


def seen_by_student(image_processor: Any, preprocess: Mapping[str, Preprocess]) -> frozenset[str]:
    """Tasks whose teacher sees the same resized image as a LLaVA. None with ``crop``, as the student crops last."""
    if geometry_of(image_processor) == "crop":
        return frozenset()
    size = (output_size(image_processor),) * 2
    return frozenset(task for task, see in preprocess.items() if type(see) is SquashedImage and see.size == size)


def _summary(dataset: ConversationDataset, total: int, drops: DropList, found: Lengths) -> str:
    left_out = "".join(f", {count} {reason}" for reason, count in drops.counts().items())
    left_out += f", {len(drops.agreed)} by drop list" if drops.agreed else ""
    shown = int(dataset.records.has_image.sum())
    images = f"{shown} with images, {len(dataset) - shown} without"
    return f"{len(dataset)} of {total} rows{left_out}; {images}; text cut in {int(found.truncated.sum())}"


def _announce_mixture(sampler: RowSampler, console: Console) -> None:
    mixture = sampler.mixture
    if mixture is not None:
        parts = zip(mixture.sizes, mixture.weights, mixture.counts, strict=True)
        shown = ", ".join(f"{size} rows x {weight:g} = {count}" for size, weight, count in parts)
        announce(console, "mixture", f"{shown}: {sampler.epoch_rows} rows an epoch")


def _announce_joined(dataset: ConversationDataset, sampler: RowSampler, console: Console) -> None:
    if sampler.groups is None or console.quiet:
        return
    rows, images = sampler.images_read(dataset.records.has_image.tolist())
    shown = f"{rows} conversations about an image share {int(images.sum())} images"
    announce(console, "joined", f"{shown} in an epoch's micro-batches of {sampler.micro_batch}")


def _show_first(dataset: ConversationDataset, sampler: RowSampler, student: Student, console: Console) -> None:
    has_image = dataset.records.has_image
    order = sorted(sampler, key=lambda index: not has_image[index])
    drop: Drop | None = None
    for index in order:
        sample = dataset[index]
        if isinstance(sample, Drop):
            drop = drop or sample
            continue
        assert isinstance(sample, Sample)
        tokenizer = student.processor.tokenizer
        console.print(show_sample(tokenizer, sample.input_ids, sample.labels, student.image_token_id))
        return
    assert drop is not None, "there are rows"
    raise DataError("no rows", f"not one could be loaded; the first: {drop.reason}, {drop.detail}")
