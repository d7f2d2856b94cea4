"""What a person reads while something runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text


def announce(console: Console, what: str, detail: str) -> None:
    """One line of the story of a run."""
    console.print(Text.assemble((f"{what:<11} ", "bold"), detail))


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
