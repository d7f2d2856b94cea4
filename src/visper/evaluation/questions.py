"""Exact-match accuracy on questions ``{image, question, answer}``, with intervals; raw answers are kept."""

from __future__ import annotations

import json
import logging
import re
import string
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from visper.common.console import Console, printable
from visper.common.errors import DataError
from visper.common.files import inside, write_text
from visper.data.images import open_image
from visper.data.rows.json_rows import read_rows
from visper.evaluation.ask import answer, as_row
from visper.evaluation.intervals import wilson
from visper.model import Student

logger = logging.getLogger(__name__)

EVERYTHING = "all"
EMPTY_SHARE = 0.01
"""Share of answers without text past which something is likely to be wrong with the model or its tokenizer."""


@dataclass(frozen=True)
class Question:
    """One question on one image (or none), with the answers accepted for it and, if given, its kind."""

    question: str
    answers: tuple[str, ...]
    image: str | None = None
    kind: str = EVERYTHING


@dataclass(frozen=True)
class Answered:
    """A question with the image that was shown and what the student said, as it said it.

    ``said`` is None where the image could not be read: the question counts as asked and not answered.
    """

    image: str | None
    kind: str
    question: str
    expected: tuple[str, ...]
    said: str | None
    correct: bool


@dataclass(frozen=True)
class Score:
    """Right answers of one kind, with the 95 % interval of their share; ``empty`` counts answers without any text."""

    kind: str
    correct: int
    total: int
    empty: int = 0

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0..1."""
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval, 0..1."""
        return wilson(self.correct, self.total)


def read_questions(path: Path) -> list[Question]:
    """Questions of a JSON or JSONL file: rows of ``{image, question, answer}``, optionally with ``kind``.

    ``answer`` is a text, a number, or a list of accepted ones; ``image`` a path, a list of one, or missing.

    Raises:
        DataError: the file or a question is not of this form; the message names the question.
    """
    rows = list(read_rows(path))
    questions = []
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or "question" not in row or "answer" not in row:
            raise DataError(f"{path}: question {number} is {str(row)[:80]!r}: expected image, question, answer")
        kind = str(row.get("kind", EVERYTHING))
        place = f"'{path}', question {number}"
        answers = _accepted(row["answer"], place)
        questions.append(Question(str(row["question"]), answers, _one_image(row.get("image"), place), kind))
    if not questions:
        raise DataError(f"{path} holds no questions")
    return questions


def _accepted(answer: Any, place: str) -> tuple[str, ...]:
    answers = answer if isinstance(answer, list) else [answer]
    if not answers or not all(isinstance(one, (str, int, float)) and str(one).strip() for one in answers):
        raise DataError("no answer", f"{place}: 'answer' is {str(answer)[:80]!r}: expected a text or a list of texts")
    return tuple(str(one) for one in answers)


def _one_image(image: Any, place: str) -> str | None:
    if isinstance(image, list) and len(image) == 1:
        image = image[0]
    if image is not None and not isinstance(image, str):
        raise DataError("bad image", f"{place}: 'image' is {str(image)[:80]!r}: expected one path")
    return image or None


def normalized(text: str) -> str:
    """What is compared: lower case, no punctuation at the ends, single spaces. ``(A).`` equals ``a``."""
    return re.sub(r"\s+", " ", text.lower()).strip(string.punctuation + " ")


def evaluate(
    student: Student,
    questions: Iterable[Question],
    images: Path,
    batch_size: int = 32,
    max_new_tokens: int = 32,
    shuffle_images: bool = False,
) -> list[Answered]:
    """Asks every question once, greedily.

    Args:
        images: folder under which the questions' image paths lie.
        shuffle_images: every question gets another question's image: what a model scores that does not look.

    Raises:
        DataError: before the first question, for images that are not there or not under their folder, and for
            questions that cannot be asked.
    """
    items = list(questions)
    shown = [q.image for q in items]
    if shuffle_images:
        shown = _others(shown)
    absent = sorted({name for name in shown if name is not None and not inside(images, name).is_file()})
    if absent:
        raise DataError(f"{len(absent)} images of the questions are not under '{images}', the first '{absent[0]}'")
    for number, (question, name) in enumerate(zip(items, shown, strict=True)):
        try:
            as_row(question.question, name)
        except DataError as error:
            raise DataError(error.reason, f"question {number}, {question.question[:80]!r}: {error.detail}") from error
    order = sorted(range(len(items)), key=lambda i: (shown[i] is None, len(items[i].question)))
    batches = [
        part
        for has in (True, False)
        for part in _chunks([i for i in order if (shown[i] is not None) is has], batch_size)
    ]
    said: dict[int, str | None] = {}
    columns = (SpinnerColumn(), TextColumn("asking {task.completed}/{task.total}"), TimeElapsedColumn())
    with torch.inference_mode(), Progress(*columns, TimeRemainingColumn(), transient=True) as progress:
        bar = progress.add_task("asking", total=len(items))
        for part in batches:
            loaded = {i: _read_image(images, shown[i]) for i in part}
            readable = [i for i in part if shown[i] is None or loaded[i] is not None]
            if readable:
                asked = [items[i].question for i in readable]
                answers = answer(student, asked, [loaded[i] for i in readable], max_new_tokens)
                said.update(zip(readable, answers, strict=True))
            progress.advance(bar, len(part))
    return [_judged(question, shown[i], said.get(i)) for i, question in enumerate(items)]


def _judged(question: Question, image: str | None, said: str | None) -> Answered:
    correct = said is not None and normalized(said) in {normalized(answer) for answer in question.answers}
    return Answered(image, question.kind, question.question, question.answers, said, correct)


def _read_image(folder: Path, name: str | None) -> Image.Image | None:
    if name is None:
        return None
    try:
        return open_image(inside(folder, name))
    except DataError as error:
        logger.warning("%s", printable(f"{name}: {error}; its questions count as not answered"))
        return None


def answers_file(model: str, questions: Path, shuffle_images: bool) -> Path:
    """Where raw answers go by default: with the model that gave them, the blind control's apart.

    ``MODEL/answers/QUESTIONS.jsonl``; for a hub id a folder of its name here.
    """
    name = f"{questions.stem}-shuffled" if shuffle_images else questions.stem
    folder = Path(model) if Path(model).is_dir() else Path(model.replace("/", "--"))
    return folder / "answers" / f"{name}.jsonl"


def _others(shown: list[str | None]) -> list[str | None]:
    """For every question an image that is not its own: the distinct images, moved round by half their number."""
    distinct = sorted({name for name in shown if name is not None})
    if len(distinct) < 2:
        raise DataError("shuffling images needs at least two different ones")
    step = len(distinct) // 2
    swap = {name: distinct[(i + step) % len(distinct)] for i, name in enumerate(distinct)}
    return [swap[name] if name is not None else None for name in shown]


def _chunks(indices: list[int], size: int) -> list[list[int]]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def scores(answered: Iterable[Answered]) -> list[Score]:
    """Accuracy by kind in order of appearance, and over all if there is more than one kind."""
    rows = list(answered)
    kinds = list(dict.fromkeys(row.kind for row in rows))
    result = [_score(kind, [row for row in rows if row.kind == kind]) for kind in kinds]
    return [*result, _score(EVERYTHING, rows)] if len(kinds) > 1 else result


def _score(kind: str, rows: list[Answered]) -> Score:
    empty = sum(row.said is not None and not row.said.strip() for row in rows)
    return Score(kind, sum(row.correct for row in rows), len(rows), empty)


def save_answers(path: Path, answered: Iterable[Answered]) -> None:
    """Every question with its raw answer, one JSON object a line; whole or not at all."""
    write_text(path, "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in answered))


def show_scores(console: Console, rows: list[Score]) -> None:
    """A table of accuracies with their intervals, and how many answers were empty."""
    table = Table("kind", "accuracy", "95 % interval", "right / asked", "empty answers")
    for row in rows:
        low, high = row.interval
        table.add_row(
            row.kind, f"{row.accuracy:.1%}", f"{low:.1%} to {high:.1%}", f"{row.correct} / {row.total}", str(row.empty)
        )
    console.print(table)
    if rows and rows[-1].empty > rows[-1].total * EMPTY_SHARE:
        console.print(
            f"{rows[-1].empty} of {rows[-1].total} answers are empty: does the tokenizer know the words of "
            "the answers, and was the model trained to answer such questions?",
            style="yellow",
        )
