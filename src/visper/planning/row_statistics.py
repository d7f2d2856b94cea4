"""The number of a run's rows and their lengths: measured on a sample, or published and assumed values."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from visper.common.errors import ConfigError, DataError
from visper.config import Run
from visper.data.chat import IGNORED, ConversationEncoder
from visper.data.image_order import image_groups
from visper.data.rows.records import DropList, Record
from visper.data.rows.sources import mixture_of, open_records
from visper.data.sampler import RowSampler
from visper.data.sets.catalog import row_files
from visper.data.vlm import NOMINAL_SIZE, encoder_for
from visper.model import Student
from visper.model.start import starting_processor

SAMPLED = 1000
"""Rows that are tokenized to estimate lengths."""
LONGEST = 50
"""Rows with the most characters and images, also tokenized: they determine the memory of a padded micro-batch."""
MICRO_BATCHES = 10_000
"""Micro-batches drawn to find the largest packed one, or as many as an epoch has, if fewer."""
CHARACTERS_PER_TOKEN = 4


class RowLength(NamedTuple):
    """One row: the number of its tokens (image and task tokens included), of its supervised tokens, of its images."""

    tokens: int
    supervised: int
    images: int


@dataclass(frozen=True)
class Rows:
    """The rows of one epoch.

    Attributes:
        sample: the measured rows; empty if lengths are assumed.
        longest: the most tokens, supervised tokens and images of any row.
        images: images per row, on average.
        source: where the figures come from, as text.
        branches: share of rows that are joined to another row's image (``data.join_conversations``).
        most_images: images per row in the joined micro-batch that has the most images.
        block: tokens of an image with its task tokens, which joined rows lack.
    """

    count: int
    sample: tuple[RowLength, ...]
    average: RowLength
    longest: RowLength
    images: float
    source: str
    branches: float = 0.0
    most_images: float = 1.0
    block: int = 0

    def largest_micro_batch(self, rows: int, packed: bool, seed: int = 0) -> list[RowLength]:
        """The micro-batch of ``rows`` rows that needs the most memory.

        Padded: every row is as long as the longest. Packed: of as many random micro-batches as an epoch has (at most
        ``MICRO_BATCHES``), the one with the most tokens, with no more images than the joined micro-batch that has the
        most. If lengths are assumed, every row is as long as the longest, which is an upper bound.
        """
        if packed and self.sample:
            drawn = random.Random(seed)
            batches = (drawn.choices(self.sample, k=rows) for _ in range(min(MICRO_BATCHES, -(-self.count // rows))))
            return self._joined(max(batches, key=lambda batch: sum(row.tokens for row in batch)))
        return self._uniform(self.longest, rows, self.longest.images if self.longest.images > 1 else self.images)

    def average_micro_batch(self, rows: int) -> list[RowLength]:
        """``rows`` average rows, with the average number of images and the average share of joined rows."""
        found = self._uniform(self.average, rows, self.images)
        branches = round(rows * self.branches)
        return [self._behind_another(row) for row in found[:branches]] + found[branches:]

    def _joined(self, rows: Sequence[RowLength]) -> list[RowLength]:
        shown = sorted(rows, key=lambda row: not row.images)
        most = math.ceil(len(rows) * self.most_images)
        return shown[:most] + [self._behind_another(row) if row.images else row for row in shown[most:]]

    def _behind_another(self, row: RowLength) -> RowLength:
        return RowLength(max(row.tokens - self.block, 2), row.supervised, 0)

    def _uniform(self, row: RowLength, rows: int, images_a_row: float) -> list[RowLength]:
        images = max(1, round(rows * images_a_row)) if images_a_row else 0
        shares = (images // rows + (at < images % rows) for at in range(rows))
        return [RowLength(row.tokens, row.supervised, share) for share in shares]


PUBLISHED: dict[str, tuple[int, int, int, int, int, float]] = {
    "llava-pretrain": (558_128, 85, 300, 25, 200, 1.0),
    "llava-665k": (665_298, 300, 4096, 150, 2048, 0.94),
    "allava-caption": (663_000, 320, 1500, 230, 1200, 1.0),
    "allava-laion": (489_044, 320, 1500, 230, 1200, 1.0),
    "allava-vflan": (202_552, 320, 1500, 230, 1200, 1.0),
}
"""Set -> published number of rows; then assumed values: mean and most text tokens, mean and most supervised tokens,
share of rows with an image. A run cuts rows at ``data.max_tokens``."""


def row_statistics(run: Run, start: Run, student: Student) -> Rows:
    """Counts and measures the rows of ``run``.

    Args:
        start: the run that provides its student (``parameters.starting_point``); its processor encodes the rows.

    Raises:
        ConfigError: the rows are not on this machine, and at least one data set is not in ``PUBLISHED``.
    """
    block = student.num_image_tokens + sum(map(len, student.task_token_ids.values()))
    try:
        rows = _measured(run, start, block)
    except (ConfigError, DataError, OSError) as error:
        rows = _published(run, block, error)
    if student.is_llava:
        return rows
    width, height = NOMINAL_SIZE
    return replace(rows, source=f"{rows.source}; every image taken as {width} x {height} pixels")


def _measured(run: Run, start: Run, block: int) -> Rows:
    records = open_records(row_files(run.data), DropList(), quiet=True)
    if not len(records):
        raise DataError("no rows", "none can be read")
    picked = random.Random(run.seed).sample(range(len(records)), min(SAMPLED, len(records)))
    sample = [records[index] for index in picked]
    guessed = records.characters // CHARACTERS_PER_TOKEN + block * records.num_images
    long = [records[index] for index in np.argsort(guessed, kind="stable")[-LONGEST:].tolist()]
    try:
        processor: Any = starting_processor(start.model_copy(update={"data": run.data}))
        encoder = encoder_for(processor, run.data.max_tokens)
        lengths, longest = (
            [length for length in (_encoded(encoder, record) for record in each) if length is not None]
            for each in (sample, long)
        )
        how = f"{len(lengths)} of {len(records)} rows tokenized"
    except ConfigError:  # the tokenizer is not on this machine
        lengths, longest = (
            [_estimated(record, block, run.data.max_tokens) for record in each] for each in (sample, long)
        )
        how = f"{len(lengths)} of {len(records)} rows estimated from their characters"
    if not lengths:
        raise DataError("no rows", f"none of {len(sample)} sampled rows can be encoded")
    mixture = mixture_of(records)
    rows = _rows(len(records) if mixture is None else sum(mixture.counts), lengths, longest, how)
    if not run.data.join_conversations:
        return rows
    opt, groups = run.optimization, image_groups(records).tolist()
    sampler = RowSampler(
        len(records), run.seed, None, None, opt.global_batch, mixture, groups=groups, micro_batch=opt.micro_batch
    )
    shown, read = sampler.images_read(records.has_image.tolist())
    images, most = int(read.sum()), int(read.max()) / opt.micro_batch
    how += f"; {shown} of {len(sampler)} show an image, in joined micro-batches {images} are encoded"
    branches = (shown - images) / len(sampler)
    return replace(rows, branches=branches, most_images=most, block=block, source=how)


def _rows(count: int, lengths: Sequence[RowLength], longest: Sequence[RowLength], source: str) -> Rows:
    means = np.mean(lengths, axis=0).tolist()
    most = RowLength(*np.max([*lengths, *longest], axis=0).tolist())
    return Rows(count, tuple(lengths), RowLength(*map(round, means)), most, means[-1], source)


def _encoded(encoder: ConversationEncoder, record: Record) -> RowLength | None:
    try:
        encoded = encoder.encode(record)
    except DataError:
        return None
    supervised = sum(label != IGNORED for label in encoded.labels)
    length = min(len(encoded.input_ids), encoder.max_tokens)
    return RowLength(length, min(supervised, length), len(record.images))


def _estimated(record: Record, block: int, most: int) -> RowLength:
    words = [len(turn.text) // CHARACTERS_PER_TOKEN for turn in record.turns]
    tokens = sum(words) + block * len(record.images)
    return RowLength(min(tokens, most), max(1, min(sum(words[1::2]), most)), len(record.images))


def _published(run: Run, block: int, error: Exception) -> Rows:
    names = [source.data_set for source in run.data.sources]
    if any(name not in PUBLISHED for name in names):
        raise ConfigError(f"the rows cannot be counted: {error}") from error
    known = [name for name in names if name is not None]
    published, text, most_text, supervised, most_supervised, images = zip(
        *(PUBLISHED[name] for name in known), strict=True
    )
    counts = [rows * source.weight for rows, source in zip(published, run.data.sources, strict=True)]
    count, most = sum(counts), run.data.max_tokens

    def mean(values: Sequence[float]) -> float:
        return sum(rows * value for rows, value in zip(counts, values, strict=True)) / count

    share = mean(images)
    average = RowLength(min(round(mean(text)) + round(block * share), most), round(mean(supervised)), 1)
    longest = RowLength(min(max(most_text) + block, most), min(max(most_supervised), most), 1)
    return Rows(
        round(count), (), average, longest, share, f"{', '.join(known)}: row count as published, lengths assumed"
    )
