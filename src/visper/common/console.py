"""What a person reads while something runs: every line of it goes through this file's ``Console``."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import rich.console
from rich.segment import Segment
from rich.text import Text

T = TypeVar("T")
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What moves a terminal's cursor, begins one of its commands, turns the direction of text, or has no encoding."""


def printable(text: str, keep: str = "") -> str:
    """``text`` with each control character, save those in ``keep``, shown by its escape, ``\\x1b`` for example."""
    return _UNSAFE.sub(lambda c: c[0] if c[0] in keep else c[0].encode("unicode_escape").decode(), text)


class Console(rich.console.Console):
    """rich's console for text that others wrote: names and ids of data, archives and servers, answers of models.

    Control characters are escaped in whatever is printed, tables and progress bars included; square brackets and colons
    are themselves, never markup or emoji (a ``Text`` has styles).
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, **options})

    def render(
        self, renderable: rich.console.RenderableType, options: rich.console.ConsoleOptions | None = None
    ) -> Iterator[Segment]:
        """The pieces of what is printed; those that rich itself makes to move the cursor stay as they are."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text, keep="\n\t"), segment.style)


def track(
    items: Iterable[T],
    description: str,
    total: float | None = None,
    quiet: bool = False,
    console: Console | None = None,
) -> Iterable[T]:
    """The items, with a progress bar unless ``quiet``; ``total`` where they have no length."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), TaskProgressColumn(), TimeRemainingColumn(elapsed_when_finished=True))
    what = TextColumn("{task.description}", "progress.description", markup=False)
    with Progress(what, *columns, console=console or Console(), disable=quiet) as progress:
        yield from progress.track(items, total, description=description)


def announce(console: Console, what: str, detail: str) -> None:
    """One line of the story of a run."""
    console.print(Text.assemble((f"{what:<11} ", "bold"), detail), soft_wrap=True)  # one line in a file, too


@contextmanager
def without_loading_bars() -> Iterator[None]:
    """Hides transformers' progress bars for loading and writing weights; downloads keep theirs on a terminal."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    if shown and sys.stderr.isatty():
        enable_progress_bars()  # transformers turns the hub's off with its own
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
