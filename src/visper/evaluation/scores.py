"""Accuracy by kind of question, beside two controls: the best constant answer and the blind control."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich.table import Column, Table
from rich.text import Text

from visper.common.console import Console
from visper.evaluation.choices import plain
from visper.evaluation.intervals import by_images, wilson_grouped
from visper.evaluation.questions import EVERYTHING, Answered

EMPTY_SHARE = 0.01
"""Share of answers without text above which something is likely to be wrong with the model or its tokenizer."""


@dataclass(frozen=True)
class Score:
    """Right answers of one kind, with the 95 % interval of their share.

    Attributes:
        interval: Wilson's, 0..1; it allows for the questions of one image being right or wrong together.
        empty: number of answers without any text.
        unanswered: number of questions that were not answered, because an image cannot be read or they are too long.
        constant: number of right answers of the best constant answer; over all kinds, of each kind's own.
        constant_answer: the best constant answer; empty over several kinds.
    """

    kind: str
    correct: int
    total: int
    interval: tuple[float, float]
    empty: int = 0
    constant: int = 0
    constant_answer: str = ""
    unanswered: int = 0

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0..1."""
        return self.correct / self.total


def scores(answered: Iterable[Answered]) -> list[Score]:
    """Accuracy by kind in order of appearance, and over all if there is more than one kind."""
    rows = list(answered)
    kinds = list(dict.fromkeys(row.kind for row in rows))
    result = [_score(kind, [row for row in rows if row.kind == kind]) for kind in kinds]
    if len(kinds) < 2:
        return result
    counts = [(score.correct, score.total, score.empty, score.constant, score.unanswered) for score in result]
    right, total, empty, constant, unanswered = map(sum, zip(*counts, strict=True))
    return [*result, Score(EVERYTHING, right, total, _interval(rows), empty, constant, unanswered=unanswered)]


def blind_scores(control: Sequence[Answered] | None) -> dict[str, Score] | None:
    """The blind control's scores by kind, without kinds whose questions have no images."""
    if control is None:
        return None
    shown = {row.kind for row in control if row.images} | {EVERYTHING}
    return {score.kind: score for score in scores(control) if score.kind in shown}


def _score(kind: str, rows: list[Answered]) -> Score:
    empty = sum(row.said is not None and not row.said.strip() for row in rows)
    ((answer, constant),) = Counter(one for row in rows for one in set(map(plain, row.expected))).most_common(1)
    right, unanswered = sum(row.correct for row in rows), sum(row.said is None for row in rows)
    return Score(kind, right, len(rows), _interval(rows), empty, constant, answer, unanswered)


def _interval(rows: Sequence[Answered]) -> tuple[float, float]:
    return wilson_grouped(by_images((float(row.correct) for row in rows), (row.images for row in rows)))


def show_scores(console: Console, rows: Sequence[Score], blind: Mapping[str, Score] | None = None) -> None:
    """Prints accuracies with intervals and controls, and warnings about doubtful scores and empty answers.

    Args:
        blind: the blind control's scores by kind; None without a blind control.
    """
    names = ("kind", "accuracy", "95 % interval", "constant", "blind", "right / asked", "empty")
    table = Table(*(Column(name, no_wrap="%" in name) for name in names if blind is not None or name != "blind"))
    doubtful = []
    for row in rows:
        control = blind.get(row.kind) if blind is not None else None
        low, high = row.interval
        best = max(row.constant / row.total, control.accuracy if control else 0.0)
        if low <= best:
            doubtful.append(row.kind)
        constant = f"{row.constant / row.total:.1%}" + (f" ({row.constant_answer[:12]})" if row.constant_answer else "")
        cells = [row.kind, f"{row.accuracy:.1%}", f"{low:.1%} to {high:.1%}", constant]
        if blind is not None:
            cells.append("no image" if control is None else f"{control.accuracy:.1%}")
        table.add_row(*cells, f"{row.correct} / {row.total}", str(row.empty))
    console.print(table)
    if doubtful:
        said = f" (within the interval): {', '.join(doubtful)}"
        console.print(Text.assemble(("not above a control that needs no image", "yellow"), said))
    if rows and rows[-1].empty > rows[-1].total * EMPTY_SHARE:
        why = ": does the tokenizer know the words of the answers, and was the model trained to answer such questions?"
        console.print(Text.assemble((f"{rows[-1].empty} of {rows[-1].total} answers are empty", "yellow"), why))
    if rows and rows[-1].unanswered:
        said = f"{rows[-1].unanswered} of {rows[-1].total} questions were not answered and count as wrong"
        console.print(Text.assemble((said, "yellow"), ": an image cannot be read, or the question is too long"))
