"""Exact-match accuracy on questions ``{image, question, answer}``, with intervals; raw answers are kept."""

from __future__ import annotations

import json
import logging
import re
import string
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from visper.common.errors import DataError
from visper.common.files import write_text
from visper.data.images import open_image
from visper.data.rows.json_rows import read_rows
from visper.evaluation.ask import answer, as_row
from visper.evaluation.intervals import wilson
from visper.model import Student

logger = logging.getLogger(__name__)

EVERYTHING = "all"


@dataclass(frozen=True)
class Question:
    """One question on one picture (or none), with its right answer and, if given, its kind."""

    question: str
    answer: str
    image: str | None = None
    kind: str = EVERYTHING


@dataclass(frozen=True)
class Answered:
    """A question with the picture that was shown and what the student said, as it said it.

    ``said`` is None where the picture could not be read: the question counts as asked and not answered.
    """

    image: str | None
    kind: str
    question: str
    expected: str
    said: str | None
    correct: bool


@dataclass(frozen=True)
class Score:
    """Right answers of one kind, with the 95 % interval of their share."""

    kind: str
    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0..1."""
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval, 0..1."""
        return wilson(self.correct, self.total)


def read_questions(path: Path) -> list[Question]:
    """Questions of a JSON file: a list of ``{image, question, answer}``, optionally with ``kind``."""
    rows = list(read_rows(path))
    questions = []
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or "question" not in row or "answer" not in row:
            raise DataError(f"{path}: question {number} is {str(row)[:80]!r}: expected image, question, answer")
        kind = str(row.get("kind", EVERYTHING))
        questions.append(Question(str(row["question"]), str(row["answer"]), row.get("image"), kind))
    if not questions:
        raise DataError(f"{path} holds no questions")
    return questions


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
        shuffle_images: every question gets another question's picture: what a model scores that does not look.

    Raises:
        DataError: pictures that are not there or questions that cannot be asked, before the first question.
    """
    items = list(questions)
    shown = [q.image for q in items]
    if shuffle_images:
        shown = _others(shown)
    absent = sorted({name for name in shown if name is not None and not (images / name).is_file()})
    if absent:
        raise DataError(f"{len(absent)} pictures of the questions are not under '{images}', the first '{absent[0]}'")
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
            pictures = {i: _picture(images, shown[i]) for i in part}
            readable = [i for i in part if shown[i] is None or pictures[i] is not None]
            if readable:
                asked = [items[i].question for i in readable]
                answers = answer(student, asked, [pictures[i] for i in readable], max_new_tokens)
                said.update(zip(readable, answers, strict=True))
            progress.advance(bar, len(part))
    return [_judged(question, shown[i], said.get(i)) for i, question in enumerate(items)]


def _judged(question: Question, image: str | None, said: str | None) -> Answered:
    correct = said is not None and normalized(said) == normalized(question.answer)
    return Answered(image, question.kind, question.question, question.answer, said, correct)


def _picture(folder: Path, name: str | None) -> Image.Image | None:
    if name is None:
        return None
    try:
        return open_image(folder / name)
    except DataError as error:
        logger.warning("%s: %s; its questions count as not answered", name, error)
        return None


def answers_file(model: str, questions: Path, shuffle_images: bool) -> Path:
    """Where raw answers go by default: with the model that gave them, the blind control's apart.

    ``MODEL/answers/QUESTIONS.jsonl``; for a hub id a folder of its name here.
    """
    name = f"{questions.stem}-shuffled" if shuffle_images else questions.stem
    folder = Path(model) if Path(model).is_dir() else Path(model.replace("/", "--"))
    return folder / "answers" / f"{name}.jsonl"


def _others(shown: list[str | None]) -> list[str | None]:
    """For every question a picture that is not its own: the distinct pictures, moved round by half their number."""
    pictures = sorted({name for name in shown if name is not None})
    if len(pictures) < 2:
        raise DataError("shuffling pictures needs at least two different ones")
    step = len(pictures) // 2
    swap = {name: pictures[(i + step) % len(pictures)] for i, name in enumerate(pictures)}
    return [swap[name] if name is not None else None for name in shown]


def _chunks(indices: list[int], size: int) -> list[list[int]]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def scores(answered: Iterable[Answered]) -> list[Score]:
    """Accuracy by kind in order of appearance, and over all if there is more than one kind."""
    rows = list(answered)
    kinds = list(dict.fromkeys(row.kind for row in rows))
    result = [Score(k, sum(r.correct for r in rows if r.kind == k), sum(r.kind == k for r in rows)) for k in kinds]
    if len(kinds) > 1:
        result.append(Score(EVERYTHING, sum(r.correct for r in rows), len(rows)))
    return result


def save_answers(path: Path, answered: Iterable[Answered]) -> None:
    """Every question with its raw answer, one JSON object a line; whole or not at all."""
    write_text(path, "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in answered))


def show_scores(console: Console, rows: list[Score]) -> None:
    """A table of accuracies with their intervals."""
    table = Table("kind", "accuracy", "95 % interval", "right / asked")
    for row in rows:
        low, high = row.interval
        table.add_row(row.kind, f"{row.accuracy:.1%}", f"{low:.1%} to {high:.1%}", f"{row.correct} / {row.total}")
    console.print(table)
