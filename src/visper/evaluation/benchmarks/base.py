"""What a benchmark is made of: its rows, how an answer is read, and how readings are scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from visper.common.errors import ConfigError, DataError
from visper.data.sets.catalog import missing, with_needs
from visper.evaluation.image_sources import ImageSource, TableImages, read_table
from visper.evaluation.intervals import weighted, wilson


@dataclass(frozen=True)
class Item:
    """One row of a benchmark.

    Attributes:
        prompt: exactly what is asked.
        answers: the right one, or, in OK-VQA, one of each annotator.
        images: their names among the benchmark's.
        kind: the task it is counted under.
        source: where its image comes from, if scores are counted by that.
        options: of multiple choice, letter -> text (empty where the text is part of the prompt only).
    """

    prompt: str
    answers: tuple[str, ...]
    images: tuple[str, ...]
    kind: str = ""
    source: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    id: str = ""


@dataclass(frozen=True)
class Reading:
    """What an answer means: read robustly, and as the published reader takes it. None: nothing that could be right."""

    text: str | None
    published: str | None


@dataclass(frozen=True)
class Column:
    """One score, 0..1, with its 95 % interval."""

    name: str
    value: float
    interval: tuple[float, float]
    total: int


@dataclass(frozen=True)
class Benchmark:
    """An entry of the table: three functions and what is asked with them."""

    name: str
    max_new_tokens: int
    rows: Callable[[Path], tuple[list[Item], ImageSource]]
    """Rows and images, from the root of all data sets."""
    read: Callable[[Item, str], Reading]
    """An answer's reading; not called for questions without an answer."""
    score: Callable[[Sequence[Item], Sequence[str | None]], list[Column]]
    """Scores of readings, which stand in the order of the items."""


def require_prepared(name: str, root: Path) -> None:
    """Checks that a benchmark's files are under the root.

    Raises:
        ConfigError: something is not; the message names the command that brings it.
    """
    absent = [place for data_set, _ in with_needs(name) for place in missing(data_set, root)]
    if absent:
        raise ConfigError(
            f"benchmark '{name}' is not under '{root}': no {', '.join(absent)}. Run `visper data prepare {name} "
            f"--root {root}`, or set --root to where it lies"
        )


def read_parquet(name: str, root: Path, columns: Sequence[str]) -> tuple[list[dict], TableImages]:
    """Rows of a benchmark's Parquet files, without their images, and the images.

    Raises:
        DataError: a file lacks a column.
    """
    require_prepared(name, root)
    files = sorted((root / "eval" / name).rglob("*.parquet"))
    if not files:
        raise DataError("no rows", f"'{root / 'eval' / name}' holds no Parquet files: `visper data prepare {name}`")
    table = read_table(files, [*columns, "image"], [], f"benchmark '{name}'")
    images = TableImages(table, "image")
    rows: list[dict] = table.remove_columns("image").to_list()
    return [{**row, "images": names} for row, names in zip(rows, images.names, strict=True)], images


def share(name: str, marks: Sequence[float]) -> Column:
    """The mean of marks in 0..1, with Wilson's interval."""
    return Column(name, sum(marks) / len(marks), wilson(sum(marks), len(marks)), len(marks))


def mean(name: str, parts: Sequence[Column]) -> Column:
    """The unweighted mean of columns of different questions."""
    value, interval = weighted((1 / len(parts), part.value, part.interval) for part in parts)
    return Column(name, value, interval, sum(part.total for part in parts))
