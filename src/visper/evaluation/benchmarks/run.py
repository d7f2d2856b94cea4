"""Runs benchmarks: asks, scores the answers, and shows the scores beside the paper's."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from visper.common.console import Console
from visper.common.files import write_text
from visper.common.manifest import model_digest
from visper.data.sampler import spread
from visper.evaluation.asking import Answers, Asker, Prompt, answers_file, blinded
from visper.evaluation.benchmarks.base import Benchmark, Column, Item, Reading, mean
from visper.evaluation.benchmarks.published_scores import AVERAGE, COLUMNS, PAPER, YARDSTICKS
from visper.model.student import student_place

PROTOCOL = "paper"


@dataclass(frozen=True)
class Result:
    """A model's scores on one benchmark.

    Attributes:
        columns: scores of the answers by our robust parser.
        published: scores of the same answers by the published parser.
        constant: scores of always giving the most frequent right answer of a question's kind.
        blind: scores with other questions' images; empty without a blind control.
        read_otherwise: number of answers that the published parser reads differently.
        empty: number of answers without any text.
        unanswered: number of questions whose image cannot be read or that are too long; they count as wrong.
    """

    name: str
    asked: int
    of: int
    columns: list[Column]
    published: list[Column]
    constant: list[Column]
    blind: list[Column]
    read_otherwise: int
    empty: int
    unanswered: int
    answers: Path


def run_benchmark(
    asker: Asker,
    benchmark: Benchmark,
    root: Path,
    limit: int | None = None,
    blind: bool = False,
    folder: Path | None = None,
) -> Result | None:
    """Asks this process's share of a benchmark. Returns the result, or None if there are several processes.

    Args:
        limit: maximum number of rows, see ``spread``.
        folder: folder of the raw answers; default: in the model's, see ``answers_file``.
    """
    rows, images = benchmark.rows(root)
    items = spread(rows, limit)
    file = answers_file(asker.model, benchmark.name, limit, folder)
    own = [item.shown for item in items]
    swapped = (blinded(own) if blind else None) or []
    answers = asker.ask([*own, *swapped], images, file, benchmark.max_new_tokens)
    if asker.share[1] > 1:
        return None
    read, read_blind = (
        [reading_of(benchmark, item, answers.get(prompt)) for item, prompt in zip(items, prompts, strict=False)]
        for prompts in (own, swapped)
    )
    answers.finish([*_lines(answers, items, own, read, False), *_lines(answers, items, swapped, read_blind, True)])
    said = [answers.get(prompt) for prompt in own]
    return Result(
        benchmark.name,
        len(items),
        len(rows),
        benchmark.score(items, [reading.text for reading in read]),
        benchmark.score(items, [reading.published for reading in read]),
        benchmark.score(items, constant_readings(benchmark, items)),
        benchmark.score(items, [reading.text for reading in read_blind]) if read_blind else [],
        sum(reading.text != reading.published for reading in read),
        sum(text is not None and not text.strip() for text in said),
        sum(text is None for text in said),
        file,
    )


def reading_of(benchmark: Benchmark, item: Item, said: str | None) -> Reading:
    """The reading of an answer; ``said`` is None if the question has none."""
    return Reading(None, None) if said is None else benchmark.read(item, said)


def constant_readings(benchmark: Benchmark, items: Sequence[Item]) -> list[str | None]:
    """The readings of always giving the most frequent right answer of an item's kind."""
    counts: dict[str, Counter[str]] = {}
    for item in items:
        counts.setdefault(item.kind, Counter()).update(item.answers)
    best = {kind: found.most_common(1)[0][0] for kind, found in counts.items()}
    return [reading_of(benchmark, item, best[item.kind]).text for item in items]


def _lines(
    answers: Answers, items: Sequence[Item], prompts: Sequence[Prompt], read: Sequence[Reading], blind: bool
) -> list[dict[str, Any]]:
    return [
        {
            "key": answers.key(prompt),
            "id": item.id,
            "blind": blind,
            "kind": item.kind,
            "images": prompt.images,
            "question": prompt.text,
            "expected": item.answers,
            "said": answers.get(prompt),
            "read": reading.text,
            "published_reading": reading.published,
        }
        for item, prompt, reading in zip(items, prompts, read, strict=False)
    ]


def average(results: Sequence[Result]) -> Column | None:
    """The paper's average, the mean of its seven columns; None unless all are present."""
    columns = {column.name: column for result in results for column in result.columns}
    return mean(AVERAGE, [columns[name] for name in COLUMNS]) if all(name in columns for name in COLUMNS) else None


def show_results(console: Console, results: Sequence[Result]) -> None:
    """Prints all scores with intervals, then a table with the published ones, then how the answers were read."""
    total = average(results)
    own = [*(column for result in results for column in result.columns), *([total] if total is not None else [])]
    others_of = ("published", "constant", *(["blind"] if any(result.blind for result in results) else []))
    beside_own = [{c.name: c.value for result in results for c in getattr(result, name)} for name in others_of]
    table = Table("score", "%", "95 % interval", "published parser", *others_of[1:], "questions")
    for column in own:
        low, high = column.interval
        cells = [f"{100 * column.value:.1f}", f"{100 * low:.1f} to {100 * high:.1f}"]
        cells += [_percent(shares, column.name) for shares in beside_own]
        table.add_row(column.name, *cells, str(column.total))
    console.print(Text(f"protocol: {PROTOCOL} (its prompts and formulas)"))
    console.print(table)
    others: dict[str, Mapping[str, float | None]] = {
        "this model": {column.name: 100 * column.value for column in own},
        **PAPER,
        **YARDSTICKS,
    }
    names = [column.name for column in own if any(column.name in row for row in PAPER.values())]
    beside = Table("", *names, box=None, pad_edge=False)
    for label, row in others.items():
        values = [row.get(name) for name in names]
        if any(value is not None for value in values):
            beside.add_row(label, *("" if value is None else f"{value:.1f}" for value in values))
    console.print(beside)
    for result in results:
        part = "" if result.asked == result.of else f" of {result.of} (the scores are not benchmark results)"
        console.print(
            f"{result.name}: {result.asked}{part} asked, {result.unanswered} not answered (image unreadable, or too "
            f"long), {result.empty} answers empty, {result.read_otherwise} answers that the published parser reads "
            f"differently; raw answers: {result.answers}"
        )


def _percent(shares: Mapping[str, float], name: str) -> str:
    return f"{100 * shares[name]:.1f}" if name in shares else ""


def save_results(file: Path, results: Sequence[Result], model: str) -> None:
    """Writes every score with its interval, as JSON: shares, 0..1. The model card shows them in percent.

    Args:
        model: the model that was asked; its digest ties the scores to its weights, unless it is a hub id.
    """
    digest = model_digest(Path(student_place(model))) if Path(model).is_dir() else None
    content: dict[str, dict[str, Any]] = {
        result.name: {
            "protocol": PROTOCOL,
            "model_digest": digest,
            "asked": result.asked,
            "of": result.of,
            "empty": result.empty,
            "unanswered": result.unanswered,
            "read_otherwise": result.read_otherwise,
            "scores": {
                c.name: {"score": c.value, "interval": c.interval, "questions": c.total} for c in result.columns
            },
            "published_parser": {c.name: c.value for c in result.published},
            "constant": {c.name: c.value for c in result.constant},
            "blind": {c.name: c.value for c in result.blind},
        }
        for result in results
    }
    total = average(results)
    if total is not None:
        content[AVERAGE] = {"score": total.value, "interval": total.interval}
    write_text(file, json.dumps(content, indent=1))
