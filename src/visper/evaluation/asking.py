"""Asks each question once: answers are kept as they come, and what was interrupted goes on where it was."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from PIL import Image
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from visper.common.cache import identity, key
from visper.common.console import Console, announce, printable
from visper.common.errors import DataError, StoppedError
from visper.common.files import write_text
from visper.evaluation.ask import answer, as_row, load_to_ask
from visper.evaluation.image_sources import ImageSource
from visper.model import Student
from visper.training.stopping import StopRequest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """What a student is shown: a text and its images, if any. ``id`` is the question's, where it has one."""

    id: str
    text: str
    images: tuple[str, ...] = ()


class Answers:
    """The answers given so far, by what was asked; with a file they outlive this process.

    A key covers the model's files, the prompt, the images and the longest answer allowed: neither the order of the
    questions nor their number is part of it, and answers of another model are never met.

    Args:
        file: where all answers are in the end. What comes meanwhile is appended to ``FILE.part-PROCESS`` beside it.
        model: identity of the model, see ``model_key``.
        process: number of this process among those that answer.
    """

    def __init__(self, file: Path | None, model: str = "", max_new_tokens: int = 32, process: int = 0) -> None:
        self.file = file
        self.max_new_tokens = max_new_tokens
        self._model = model
        self._process = process
        self._said: dict[str, str] = {}
        for place in [] if file is None else [file, *self._parts()]:
            self._said.update(_read(place))

    def key(self, prompt: Prompt) -> str:
        """Under which the answer to a prompt is kept."""
        return key(self._model, prompt.id, prompt.text, "\n".join(prompt.images), self.max_new_tokens)

    def get(self, prompt: Prompt) -> str | None:
        """What was said, or None."""
        return self._said.get(self.key(prompt))

    def add(self, prompts: Sequence[Prompt], said: Sequence[str]) -> None:
        """Keeps the answers of a batch."""
        rows = [{"key": self.key(p), "question": p.text, "said": s} for p, s in zip(prompts, said, strict=True)]
        self._said.update({row["key"]: row["said"] for row in rows})
        if self.file is None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self._part(self._process).open("a", encoding="utf-8") as part:
            # A line that a killed process left unfinished must not swallow the next one.
            part.write(("\n" if part.tell() else "") + lines(rows))

    def finish(self, rows: Sequence[dict[str, Any]]) -> None:
        """Writes the complete file, a JSON object a line, in place of the parts."""
        assert self.file is not None
        write_text(self.file, lines(rows))
        for part in self._parts():
            part.unlink()

    def _part(self, process: int) -> Path:
        assert self.file is not None
        return self.file.with_name(f"{self.file.name}.part-{process}")

    def _parts(self) -> list[Path]:
        assert self.file is not None
        start = f"{self.file.name}.part-"
        folder = self.file.parent
        return sorted(path for path in folder.iterdir() if path.name.startswith(start)) if folder.is_dir() else []


def lines(rows: Sequence[dict[str, Any]]) -> str:
    """A JSON object a line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _read(file: Path) -> Iterator[tuple[str, str]]:
    """Key and answer of each line; lines cut short, or of another kind, hold none."""
    if not file.is_file():
        return
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("said"), str) and "key" in row:
            yield row["key"], row["said"]


def model_key(model: str) -> str:
    """Identity of a model's files as they are now, or the commit of one that came from the hub."""
    place = Path(model)
    if not place.is_dir():
        return key(model, str(try_to_load_from_cache(model, "config.json")))
    folder = place / "model" if (place / "model" / "config.json").is_file() else place
    return key(*(identity(file) for file in sorted(folder.iterdir()) if file.is_file()))


def ask_all(
    student: Callable[[], Student],
    prompts: Sequence[Prompt],
    images: ImageSource,
    answers: Answers,
    batch_size: int = 32,
    share: tuple[int, int] = (0, 1),
) -> None:
    """Asks, greedily and in batches, the prompts that have no answer yet; those with an unreadable image get none.

    Args:
        student: gives the student; called only if something is to be asked.
        share: number of this process and of all that ask; each asks its own part of the prompts.

    Raises:
        DataError: before the first question, for images that are not there and for prompts that cannot be asked.
        StoppedError: SIGTERM or Ctrl-C; the answers so far are kept.
    """
    require_askable(prompts, images)
    # By length, so that a batch pads little. The order depends on all prompts, not on which have an answer: processes
    # that start while others answer must agree on their shares.
    order = sorted(dict.fromkeys(prompts), key=lambda prompt: (-len(prompt.images), len(prompt.text)))
    todo = [prompt for prompt in order[share[0] :: share[1]] if answers.get(prompt) is None]
    stop = StopRequest()
    columns = (SpinnerColumn(), TextColumn("asking {task.completed}/{task.total}"), TimeElapsedColumn())
    console = Console()
    hidden = share[0] != 0 or not console.is_terminal
    bars = Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=hidden)
    with torch.inference_mode(), bars as progress, stop.on_signals():
        bar = progress.add_task("asking", total=len(todo))
        for batch in (todo[start : start + batch_size] for start in range(0, len(todo), batch_size)):
            if stop.asked:
                raise StoppedError(f"{len(todo)} questions were open, {progress.tasks[0].completed:.0f} are answered; "
                                   "the same command asks the others")  # fmt: skip
            shown = {prompt: opened for prompt in batch if (opened := open_images(images, prompt.images)) is not None}
            if shown:
                texts = [prompt.text for prompt in shown]
                answers.add(list(shown), answer(student(), texts, list(shown.values()), answers.max_new_tokens))
            progress.advance(bar, len(batch))


def require_askable(prompts: Sequence[Prompt], images: ImageSource) -> None:
    """Raises DataError for images that are not there, and for prompts that cannot be asked."""
    absent = images.absent(sorted({name for prompt in prompts for name in prompt.images}))
    if absent:
        raise DataError(
            "missing images", f"{len(absent)} images of the questions are not there, the first '{absent[0]}'"
        )
    for number, prompt in enumerate(prompts):
        try:
            as_row(prompt.text, prompt.images)
        except DataError as error:
            raise DataError(error.reason, f"question {number}, {prompt.text[:80]!r}: {error.detail}") from error


def open_images(images: ImageSource, names: Sequence[str]) -> list[Image.Image] | None:
    """The images of a question; None, with a warning, where one cannot be read."""
    try:
        return [images.open(name) for name in names]
    except DataError as error:
        logger.warning("%s", printable(f"{', '.join(names)}: {error}; their questions count as not answered"))
        return None


class Asker:
    """A model that this process asks, loaded at the first question that has no answer yet.

    Args:
        model: a stage's output, a LLaVA folder or a hub id.
        share: number of this process and of all that ask.
    """

    def __init__(self, model: str, batch_size: int = 32, share: tuple[int, int] = (0, 1)) -> None:
        self.model = model
        self.batch_size = batch_size
        self.share = share
        self._student: Student | None = None
        if not Path(model).is_dir():
            self.student()  # which commit of the hub it is, is known once it is here
        self._key = model_key(model)

    def student(self) -> Student:
        """The loaded model."""
        if self._student is None:
            self._student = load_to_ask(self.model)
        return self._student

    def ask(self, prompts: Sequence[Prompt], images: ImageSource, file: Path | None, max_new_tokens: int) -> Answers:
        """Asks this process's share of the prompts, see ``ask_all``; the answers of all that have asked so far."""
        answers = Answers(file, self._key, max_new_tokens, self.share[0])
        different = set(prompts)
        todo = sum(answers.get(prompt) is None for prompt in different)
        process, processes = self.share
        if process == 0 and todo:
            shared = f", in {processes} processes" if processes > 1 else ""
            announce(Console(), "asking", f"{todo} questions, {len(different) - todo} are answered{shared}")
        ask_all(self.student, prompts, images, answers, self.batch_size, self.share)
        return answers


def other_images(shown: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]] | None:
    """For every question images that are not its own: the distinct images, moved round by half their number or the
    next number that shows none of its own.

    Returns:
        The images' names in the questions' order; None where there are not enough for a question.
    """
    distinct = sorted({name for names in shown for name in names})
    places = {name: i for i, name in enumerate(distinct)}
    half = len(distinct) // 2
    found = []
    for names in shown:
        moved = (
            tuple(distinct[(places[name] + half + more) % len(distinct)] for name in names)
            for more in range(len(distinct))
        )
        other = next((new for new in moved if not set(new) & set(names)), None) if names else ()
        if other is None:
            return None
        found.append(other)
    return found if distinct else None


def own_share() -> tuple[int, int]:
    """Number of this process and of all that a launcher started, from the environment that it gave this one.

    Clusters set RANK and WORLD_SIZE in shells, too, where nothing was started: LOCAL_WORLD_SIZE only a launcher sets.
    """
    if "LOCAL_WORLD_SIZE" not in os.environ:
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def answers_file(model: str, name: str, limit: int | None = None) -> Path:
    """Where raw answers go by default: ``MODEL/answers/NAME.jsonl``, of limited runs ``NAME-LIMIT.jsonl``; for a hub id
    in a folder of its name here."""
    folder = Path(model) if Path(model).is_dir() else Path(model.replace("/", "--"))
    return folder / "answers" / (f"{name}.jsonl" if limit is None else f"{name}-{limit}.jsonl")
