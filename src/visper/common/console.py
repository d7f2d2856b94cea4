"""The console: all terminal output goes through ``Console``, which escapes control characters."""

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
"""Characters that move the cursor, begin a terminal command or change the text direction, and lone surrogates."""


def printable(text: str, keep: str = "") -> str:
    """``text`` with each control character, except those in ``keep``, replaced by its escape such as ``\\x1b``."""
    return _UNSAFE.sub(lambda c: c[0] if c[0] in keep else c[0].encode("unicode_escape").decode(), text)


class Console(rich.console.Console):
    """rich's console for untrusted text: names and ids from data, archives and servers, and answers of models.

    Control characters are escaped in all output, including tables and progress bars. Square brackets and colons are
    printed literally, never read as markup or emoji; use a ``Text`` for styles.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, **options})

    def render(
        self, renderable: rich.console.RenderableType, options: rich.console.ConsoleOptions | None = None
    ) -> Iterator[Segment]:
        """rich's segments, escaped; its own cursor-control segments are left unchanged."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text, keep="\n\t"), segment.style)


def track(
    items: Iterable[T],
    description: str,
    total: float | None = None,
    quiet: bool = False,
    console: Console | None = None,
) -> Iterable[T]:
    """The items, with a progress bar unless ``quiet``. Give ``total`` if the items have no length."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), TaskProgressColumn(), TimeRemainingColumn(elapsed_when_finished=True))
    title = TextColumn("{task.description}", "progress.description", markup=False)
    with Progress(title, *columns, console=console or Console(), disable=quiet) as progress:
        yield from progress.track(items, total, description=description)


def announce(console: Console, what: str, detail: str) -> None:
    """Prints one line of a run's log: ``what`` in bold, then ``detail``."""
    console.print(Text.assemble((f"{what:<11} ", "bold"), detail), soft_wrap=True)  # one line also in a file


@contextmanager
def without_loading_bars() -> Iterator[None]:
    """Hides transformers' progress bars for loading and writing weights; downloads keep theirs on a terminal."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    if shown and sys.stderr.isatty():
        enable_progress_bars()  # transformers has disabled the hub's together with its own
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
