"""Asks each question once. Answers are saved as they come, so that an interrupted evaluation can be resumed."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from PIL import Image
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

import visper
from visper.common.cache import identity, key
from visper.common.console import Console, announce, printable
from visper.common.errors import ConfigError, DataError, StoppedError, counted
from visper.common.files import make_folder, naming, write_text
from visper.evaluation.ask import answer, as_row, load_to_ask, precision
from visper.evaluation.image_sources import ImageSource
from visper.model import Student
from visper.model.card import CARD
from visper.training.stopping import StopRequest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """The text and the images, if any, that a student is shown. ``id`` is the question's id, if it has one."""

    id: str
    text: str
    images: tuple[str, ...] = ()


class Answers:
    """The answers so far; with a file they are kept beyond this process.

    The key of an answer covers the model, the prompt, the content of its images and the maximum length of an answer,
    but not the images' names or the number and order of the questions. Answers of another model or about another image
    are never found.

    Args:
        file: file of all answers, written at the end. Until then, answers are appended to ``FILE.part-PROCESS``.
        model: identity of the model, of its precision and of the code that runs it.
    """

    def __init__(
        self, file: Path | None, images: ImageSource, model: str = "", max_new_tokens: int = 32, process: int = 0
    ) -> None:
        self.file = file
        self.images = images
        self.max_new_tokens = max_new_tokens
        self._model = model
        self._process = process
        self._earlier: dict[str, dict[str, Any]] = {}
        for place in [] if file is None else [file, *self._parts()]:
            self._earlier.update({row["key"]: row for row in _read(place)})
        self._said: dict[str, str] = {key: row["said"] for key, row in self._earlier.items()}

    def key(self, prompt: Prompt) -> str:
        """The key of a prompt's answer."""
        shown = "\n".join(map(self.images.digest, prompt.images))
        return key(self._model, prompt.id, prompt.text, shown, self.max_new_tokens)

    def get(self, prompt: Prompt) -> str | None:
        """The answer to a prompt; None if it has none yet."""
        return self._said.get(self.key(prompt))

    def add(self, said: Mapping[Prompt, str]) -> None:
        """Saves the answers of a batch."""
        rows = [
            {"key": self.key(prompt), "model": self._model, "question": prompt.text, "said": text}
            for prompt, text in said.items()
        ]
        self._said.update({row["key"]: row["said"] for row in rows})
        if self.file is None or not rows:
            return
        make_folder(self.file.parent)
        with naming(self.file), self._part(self._process).open("a", encoding="utf-8") as part:
            # Start on a new line, because a killed process may have left an unfinished one.
            part.write(("\n" if part.tell() else "") + lines(rows))

    def finish(self, rows: Sequence[dict[str, Any]]) -> None:
        """Writes the complete file, one JSON object per line, and removes the parts.

        Other answers of the same model follow, marked as ``earlier``: with --blind, more questions or another length,
        they are needed again. Those of other models, such as the one before a new training, never are.
        """
        assert self.file is not None
        own = [{"key": row["key"], "model": self._model, **row} for row in rows]
        asked = {row["key"] for row in rows}
        earlier = [row for row in self._earlier.values() if row.get("model") == self._model and row["key"] not in asked]
        write_text(self.file, lines([*own, *({**row, "earlier": True} for row in earlier)]))
        for part in self._parts():
            part.unlink(missing_ok=True)  # another command may have finished the same answers

    def _part(self, process: int) -> Path:
        assert self.file is not None
        return self.file.with_name(f"{self.file.name}.part-{process}")

    def _parts(self) -> list[Path]:
        assert self.file is not None
        start = f"{self.file.name}.part-"
        folder = self.file.parent
        return sorted(path for path in folder.iterdir() if path.name.startswith(start)) if folder.is_dir() else []


def lines(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as text, one JSON object per line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _read(file: Path) -> Iterator[dict[str, Any]]:
    """Each line's key, answer and what else it has; truncated lines and lines of another form are skipped."""
    if not file.is_file():
        return
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("said"), str) and "key" in row:
            yield row


def model_key(model: str) -> str:
    """Identity of the current files of a local model but its card, or of the cached commit of a hub model."""
    place = Path(model)
    if not place.is_dir():
        return key(model, str(try_to_load_from_cache(model, "config.json")))
    folder = place / "model" if (place / "model" / "config.json").is_file() else place
    return key(*(identity(file) for file in sorted(folder.iterdir()) if file.is_file() and file.name != CARD))


def ask_all(
    student: Callable[[], Student],
    prompts: Sequence[Prompt],
    answers: Answers,
    batch_size: int = 32,
    share: tuple[int, int] = (0, 1),
) -> None:
    """Asks the prompts that have no answer yet, greedily and in batches.

    Prompts with an unreadable image and those that are longer than the LLM's positions get none.

    Args:
        student: returns the student; called only if there is something to ask.
        share: index of this process and number of processes; each asks its own share of the prompts.

    Raises:
        DataError: an image is missing, or a prompt is invalid; raised before the first question.
        StoppedError: SIGTERM or Ctrl-C; the answers so far are saved.
    """
    require_askable(prompts, answers.images)
    # Sorted by length, so that batches have little padding. The order depends on all prompts, not only on open ones:
    # processes that start while others answer must agree on their shares.
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
            answers.add(ask_batch(student, batch, answers.images, answers.max_new_tokens))
            progress.advance(bar, len(batch))
            if stop.asked:
                raise StoppedError(
                    f"told to stop: {progress.tasks[0].completed:.0f} of {counted(len(todo), 'question')} answered; to "
                    "go on, repeat the command"
                )


def ask_batch(
    student: Callable[[], Student],
    batch: Sequence[Prompt],
    images: ImageSource,
    max_new_tokens: int,
    generate: Callable[..., Tensor] | None = None,
) -> dict[Prompt, str]:
    """Greedy answers to a batch of prompts. Prompts with an unreadable image and too long ones get none.

    Args:
        generate: see ``answer``.
    """
    opened = {prompt: _open(images, prompt.images) for prompt in batch}
    shown = {prompt: own for prompt, own in opened.items() if own is not None}
    if not shown:
        return {}
    texts = [prompt.text for prompt in shown]
    said = answer(student(), texts, list(shown.values()), max_new_tokens, generate)
    return {prompt: text for prompt, text in zip(shown, said, strict=True) if text is not None}


def require_askable(prompts: Sequence[Prompt], images: ImageSource) -> None:
    """Raises DataError if an image is missing or a prompt is invalid."""
    for number, prompt in enumerate(prompts):
        try:
            as_row(prompt.text, prompt.images)
        except DataError as error:
            raise DataError(error.reason, f"question {number}, {prompt.text[:80]!r}: {error.detail}") from error
    absent = images.absent(sorted({name for prompt in prompts for name in prompt.images}))
    if absent:
        raise DataError(
            "missing images",
            f"{counted(len(absent), 'image')} of the questions cannot be found, the first is '{absent[0]}'",
        )


def _open(images: ImageSource, names: Sequence[str]) -> list[Image.Image] | None:
    """The images of a question; None, with a warning, if one cannot be read."""
    try:
        return [images.open(name) for name in names]
    except DataError as error:
        logger.warning("%s", printable(f"{', '.join(names)}: {error}; their questions count as unanswered"))
        return None


class Asker:
    """Asks a model, which is loaded at the first question that has no answer yet.

    Args:
        model: a stage's output, a LLaVA folder or a hub id.
        share: index of this process and number of processes.
    """

    def __init__(self, model: str, batch_size: int = 32, share: tuple[int, int] = (0, 1)) -> None:
        self.model = model
        self.batch_size = batch_size
        self.share = share
        self._student: Student | None = None
        if not Path(model).is_dir():
            self.student()  # the commit of a hub model is known after its download
        self._key = key(model_key(model), str(precision()), visper.__version__, transformers.__version__)

    def student(self) -> Student:
        """The loaded model."""
        if self._student is None:
            self._student = load_to_ask(self.model)
        return self._student

    def ask(self, prompts: Sequence[Prompt], images: ImageSource, file: Path | None, max_new_tokens: int) -> Answers:
        """Asks this process's share of the prompts, see ``ask_all``. Returns the answers of all processes so far."""
        answers = Answers(file, images, self._key, max_new_tokens, self.share[0])
        different = set(prompts)
        todo = sum(answers.get(prompt) is None for prompt in different)
        process, processes = self.share
        if process == 0 and todo:
            shared = f", in {processes} processes" if processes > 1 else ""
            announce(
                Console(), "asking", f"{counted(todo, 'question')}, {len(different) - todo} already answered{shared}"
            )
        ask_all(self.student, prompts, answers, self.batch_size, self.share)
        return answers


def blinded(prompts: Sequence[Prompt]) -> list[Prompt] | None:
    """The prompts of the blind control, with the images of other prompts (``other_images``)."""
    others = other_images([prompt.images for prompt in prompts])
    if others is None:
        return None
    return [replace(prompt, images=names) for prompt, names in zip(prompts, others, strict=True)]


def other_images(shown: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]] | None:
    """Other images for every question: the list of distinct images is rotated by half its length, or further until
    none is the question's own.

    Returns:
        Names of images, in the order of the questions; None if there are not enough different images.
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
    """Index of this process and number of processes, from the environment variables of a launcher.

    Clusters also set RANK and WORLD_SIZE in shells without a launcher; only launchers set LOCAL_WORLD_SIZE.
    """
    if "LOCAL_WORLD_SIZE" not in os.environ:
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def require_writable(file: Path, remedy: str) -> None:
    """Checks that the file of answers can be written, before a model is loaded; creates nothing.

    Raises:
        ConfigError: its folder, or the one in which that will be made, cannot be written.
    """
    folder = next(place for place in file.absolute().parents if os.path.lexists(place))
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(
            f"the answers cannot be written to '{file}', since '{folder}' is not a writable folder: {remedy}"
        )


def answers_file(model: str, name: str, limit: int | None = None, folder: Path | None = None) -> Path:
    """The file of raw answers: ``NAME.jsonl``, or ``NAME-LIMIT.jsonl`` with a limit, in the folder; default:
    ``MODEL/answers``. For a hub id, MODEL is a folder of its name in the current folder."""
    own = Path(model) if Path(model).is_dir() else Path(model.replace("/", "--"))
    return (folder or own / "answers") / (f"{name}.jsonl" if limit is None else f"{name}-{limit}.jsonl")
