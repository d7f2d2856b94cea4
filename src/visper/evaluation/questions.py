"""Questions with known answers: asking them, judging the answers, and the blind control."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from visper.common.errors import DataError
from visper.common.files import write_text
from visper.evaluation.asking import Answers, Asker, Prompt, ask_all, blinded, lines
from visper.evaluation.choices import LETTERS, ask_with_options, plain, read_choice
from visper.evaluation.image_sources import ImageFolder, ImageSource
from visper.model import Student

EVERYTHING = "all"


@dataclass(frozen=True)
class Question:
    """A question, its images, if any, its accepted answers and its kind.

    Attributes:
        options: options of a multiple-choice question; ``answers`` are then the letter and the text of the right one.
        id: the question's id in its file, if it has one.
    """

    question: str
    answers: tuple[str, ...]
    images: tuple[str, ...] = ()
    kind: str = EVERYTHING
    options: tuple[str, ...] = ()
    id: str = ""

    @property
    def prompt(self) -> Prompt:
        """The prompt, with the question's own images."""
        text = ask_with_options(self.question, self.options) if self.options else self.question
        return Prompt(self.id, text, self.images)

    def accepts(self, said: str) -> bool:
        """Whether an answer is right: equal to an accepted one except for case and punctuation at the ends, or the same
        number (see ``plain``). For multiple choice, it must mean the right option (see ``read_choice``)."""
        if self.options:
            return read_choice(said, dict(zip(LETTERS, self.options, strict=False))) == self.answers[0]
        return plain(said) in map(plain, self.answers)


@dataclass(frozen=True)
class Answered:
    """A question with the images that were shown and the student's raw answer.

    ``said`` is None if an image cannot be read or the question is too long: it counts as asked, but not answered.
    """

    images: tuple[str, ...]
    kind: str
    question: str
    expected: tuple[str, ...]
    said: str | None
    correct: bool
    id: str = ""


def by_content(questions: Iterable[Question], images: ImageSource) -> list[Question]:
    """The questions, with one name for all images of the same content.

    Otherwise the blind control may show a question's own image, and intervals take its copies as independent.
    """
    first: dict[str, str] = {}

    def name_of(image: str) -> str:
        return first.setdefault(images.digest(image) or image, image)

    return [replace(question, images=tuple(map(name_of, question.images))) for question in questions]


def judge(question: Question, images: tuple[str, ...], said: str | None) -> Answered:
    """Judges the answer ``said`` to a question."""
    correct = said is not None and question.accepts(said)
    return Answered(images, question.kind, question.question, question.answers, said, correct, question.id)


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
        images: folder of the questions' image paths.
        shuffle_images: ask every question with other questions' images, the blind control.

    Raises:
        DataError: an image is missing or outside the folder, a question is invalid, or the blind control has fewer than
            two different images; raised before the first question.
    """
    source = ImageFolder(images)
    items = by_content(questions, source)
    own = [question.prompt for question in items]
    prompts = blinded(own) if shuffle_images else own
    if prompts is None:
        raise DataError("no other images", "the blind control needs questions on at least two different images")
    answers = Answers(None, source, max_new_tokens=max_new_tokens)
    ask_all(lambda: student, prompts, answers, batch_size)
    return [judge(q, p.images, answers.get(p)) for q, p in zip(items, prompts, strict=True)]


def ask_questions(
    asker: Asker,
    questions: Sequence[Question],
    images: ImageSource,
    file: Path | None = None,
    max_new_tokens: int = 32,
    blind: bool = True,
) -> tuple[list[Answered], list[Answered] | None]:
    """Asks this process's share of the questions, and returns the answers of all processes so far.

    Args:
        file: file of raw answers; completed if there is only one process.
        blind: also ask each question with other questions' images.

    Returns:
        The answers, and those of the blind control, or None if ``blind`` is off or fewer than two images differ.
    """
    questions = by_content(questions, images)
    prompts = [[question.prompt for question in questions]]
    control = blinded(prompts[0]) if blind else None
    prompts += [control] if control is not None else []
    answers = asker.ask([prompt for part in prompts for prompt in part], images, file, max_new_tokens)
    judged = [[judge(q, p.images, answers.get(p)) for q, p in zip(questions, part, strict=True)] for part in prompts]
    if file is not None and asker.share == (0, 1):
        answers.finish(
            [
                {"key": answers.key(prompt), "blind": number == 1, **asdict(row)}
                for number, (part, rows) in enumerate(zip(prompts, judged, strict=True))
                for prompt, row in zip(part, rows, strict=True)
            ]
        )
    return judged[0], judged[1] if control is not None else None


def save_answers(path: Path, answered: Iterable[Answered]) -> None:
    """Writes every question with its raw answer, one JSON object per line; the file is complete or absent."""
    rows: list[dict[str, Any]] = [asdict(row) for row in answered]
    write_text(path, lines(rows))
