"""How many rows a run has and how long they are: measured on a sample where they are, else published or assumed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from visper.common.errors import ConfigError, DataError
from visper.config import Run
from visper.data.chat import IGNORED, ConversationEncoder
from visper.data.rows.records import DropList, Record
from visper.data.rows.sources import mixture_of, open_records
from visper.data.sets.catalog import row_files
from visper.model import Student, build_processor

SAMPLED = 1000
"""Rows that are tokenized to learn lengths."""
CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True)
class Rows:
    """Rows of an epoch; tokens a row (image and task tokens included) on average and at most; supervised tokens a row
    on average and at most; share of rows with a picture; where the figures come from."""

    count: int
    mean: int
    longest: int
    supervised: int
    most_supervised: int
    pictures: float
    source: str


PUBLISHED: dict[str, tuple[int, int, int, int, int, float]] = {
    "llava-pretrain": (558_128, 85, 300, 25, 200, 1.0),
    "llava-665k": (665_298, 300, 4096, 150, 2048, 0.94),
    "allava-caption": (663_000, 320, 1500, 230, 1200, 1.0),
    "allava-laion": (489_044, 320, 1500, 230, 1200, 1.0),
    "allava-vflan": (202_552, 320, 1500, 230, 1200, 1.0),
}
"""Set -> rows as published; text tokens on average and at most, supervised ones likewise, share with a picture: all
these assumed, not measured. A run cuts rows at ``data.max_tokens``."""


def rows_of(run: Run, first: Run, student: Student) -> Rows:
    """The rows of ``run``, whose student (a skeleton) is assembled by ``first``.

    Raises:
        ConfigError: the rows are not here and none of the sets is a published one.
    """
    block = int(student.model.config.image_seq_length) + sum(map(len, student.task_token_ids.values()))
    try:
        return _measured(run, first, block)
    except (ConfigError, DataError, OSError) as error:
        return _published(run, block, error)


def _measured(run: Run, first: Run, block: int) -> Rows:
    records = open_records(row_files(run.data), DropList(), quiet=True)
    if not len(records):
        raise DataError("no rows", "none can be read")
    picked = random.Random(run.seed).sample(range(len(records)), min(SAMPLED, len(records)))
    sample = [records[index] for index in picked]
    assert first.student is not None
    try:
        encoder = ConversationEncoder(build_processor(first.student, run.data.geometry), run.data.max_tokens)
        counted = [found for found in (_encoded(encoder, record) for record in sample) if found is not None]
        how = f"{len(counted)} of {len(records)} rows tokenized"
    except ConfigError:  # a tokenizer that is not here
        counted = [_estimated(record, block, run.data.max_tokens) for record in sample]
        how = f"{len(counted)} of {len(records)} rows estimated by their characters"
    tokens, supervised = zip(*counted, strict=True) if counted else ((block,), (1,))
    pictures = sum(record.image is not None for record in sample) / len(sample)
    mixture = mixture_of(records)
    return Rows(
        len(records) if mixture is None else sum(mixture.counts),
        round(sum(tokens) / len(tokens)),
        max(tokens),
        round(sum(supervised) / len(supervised)),
        max(supervised),
        pictures,
        how,
    )


def _encoded(encoder: ConversationEncoder, record: Record) -> tuple[int, int] | None:
    try:
        encoded = encoder.encode(record)
    except DataError:
        return None
    return len(encoded.input_ids), sum(label != IGNORED for label in encoded.labels)


def _estimated(record: Record, block: int, most: int) -> tuple[int, int]:
    words = [len(turn.text) // CHARACTERS_PER_TOKEN for turn in record.turns]
    tokens = sum(words) + (block if record.image is not None else 0)
    return min(tokens, most), max(1, min(sum(words[1::2]), most))


def _published(run: Run, block: int, error: Exception) -> Rows:
    names = [source.data_set for source in run.data.sources]
    unknown = [source for source, name in zip(run.data.sources, names, strict=True) if name not in PUBLISHED]
    if unknown:
        raise ConfigError(f"the rows cannot be counted: {error}") from error
    published = [PUBLISHED[name] for name in names if name is not None]
    weights = [source.weight for source in run.data.sources]
    sets = [(round(rows[0] * weight), *rows[1:]) for rows, weight in zip(published, weights, strict=True)]
    count = sum(entry[0] for entry in sets)
    mean = [round(sum(entry[0] * entry[at] for entry in sets) / count) for at in (1, 3)]
    pictures = sum(entry[0] * entry[5] for entry in sets) / count
    most = run.data.max_tokens
    return Rows(
        count,
        min(mean[0] + round(block * pictures), most),
        min(max(entry[2] for entry in sets) + block, most),
        mean[1],
        min(max(entry[4] for entry in sets), most),
        pictures,
        f"{', '.join(map(str, map(Path, filter(None, names))))}: row count as published, lengths assumed",
    )
