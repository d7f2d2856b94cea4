"""Types and helpers of benchmarks: rows, readings of answers, and scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from visper.common.errors import ConfigError, DataError
from visper.data.sets.catalog import missing, with_needs
from visper.evaluation.asking import Prompt
from visper.evaluation.image_sources import ImageSource, TableImages, read_table
from visper.evaluation.intervals import by_images, weighted, wilson_grouped


@dataclass(frozen=True)
class Item:
    """One row of a benchmark.

    Attributes:
        answers: the right answer; in OK-VQA, the answer of each annotator.
        images: names of its images in the benchmark's source of images.
        kind: the task under which it is scored.
        source: the data set of its image, if scores are computed by source.
        options: options of multiple choice, letter -> text (empty if only the prompt has the text).
    """

    prompt: str
    answers: tuple[str, ...]
    images: tuple[str, ...]
    kind: str = ""
    source: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    id: str = ""

    @property
    def shown(self) -> Prompt:
        """Its text with its images."""
        return Prompt(self.id, self.prompt, self.images)


@dataclass(frozen=True)
class Reading:
    """What an answer means to our robust parser (``text``) and to the published one. None: it cannot be right."""

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
    """A benchmark: its name, the maximum length of an answer, the column of its overall score, and its functions."""

    name: str
    max_new_tokens: int
    overall: str
    rows: Callable[[Path], tuple[list[Item], ImageSource]]
    """Root folder of all data sets -> rows and images."""
    read: Callable[[Item, str], Reading]
    """Reads an answer; not called for questions without an answer."""
    mark: Callable[[Item, str | None], float]
    """Marks a reading, 0..1."""
    columns: Callable[[Sequence[Item], Sequence[float]], list[Column]] | None = None
    """Scores of the items' marks; default: their mean, as the overall score. The overall score is absent if the items
    have a part of it only."""

    def score(self, items: Sequence[Item], readings: Sequence[str | None]) -> list[Column]:
        """Scores readings, given in the order of the items."""
        marks = [self.mark(item, text) for item, text in zip(items, readings, strict=True)]
        return self.columns(items, marks) if self.columns else [share(self.overall, items, marks)]


def require_prepared(name: str, root: Path) -> None:
    """Checks that a benchmark's files are under the root.

    Raises:
        ConfigError: a file is missing; the message names the command that downloads it.
    """
    absent = [place for data_set, _ in with_needs(name) for place in missing(data_set, root)]
    if absent:
        raise ConfigError(
            f"benchmark '{name}' is not complete under '{root}': no {', '.join(absent)}. Run `visper data prepare "
            f"{name} --root {root}`, or set --root to the folder that has it"
        )


def read_parquet(name: str, root: Path, columns: Sequence[str]) -> tuple[list[dict], TableImages]:
    """Rows of a benchmark's Parquet files, without their images, and the images.

    Raises:
        DataError: a file lacks a column.
    """
    require_prepared(name, root)
    files = sorted((root / "eval" / name).rglob("*.parquet"))
    if not files:
        prepare = f"`visper data prepare {name} --root {root}`"
        raise DataError("no rows", f"'{root / 'eval' / name}' has no Parquet files: {prepare}")
    table = read_table(files, [*columns, "image"], [], f"benchmark '{name}'")
    images = TableImages(table, "image")
    rows: list[dict] = table.remove_columns("image").to_list()
    return [{**row, "images": names} for row, names in zip(rows, images.names, strict=True)], images


def share(name: str, items: Sequence[Item], marks: Sequence[float]) -> Column:
    """The mean of the items' marks in 0..1, with Wilson's interval over images."""
    interval = wilson_grouped(by_images(marks, (item.images for item in items)))
    return Column(name, sum(marks) / len(marks), interval, len(marks))


def mean(name: str, parts: Sequence[Column]) -> Column:
    """The unweighted mean of columns over different questions."""
    value, interval = weighted((1 / len(parts), part.value, part.interval) for part in parts)
    return Column(name, value, interval, sum(part.total for part in parts))
