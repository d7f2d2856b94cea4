"""Helpers for long downloads: a progress bar, iteration in a thread that Ctrl-C can stop, a check of disk space."""

from __future__ import annotations

import queue
import shutil
import threading
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TypeVar

from rich.progress import Progress, TaskID

from visper.common.errors import DataError

T = TypeVar("T")
POLL = 0.2
"""Seconds between checks of whether the work should stop."""


class ProgressBar:
    """One line of the progress display; it also stops the work when ``stop`` is set."""

    def __init__(self, progress: Progress, stop: threading.Event, title: str) -> None:
        self.progress, self.stop, self.title = progress, stop, title
        self.task: TaskID | None = None

    def show(self, what: str, done: int, total: int | None) -> None:
        """Shows the step ``what`` at ``done`` of ``total`` bytes."""
        if self.task is None:
            self.task = self.progress.add_task(self.title, total=total)
        self.progress.update(self.task, description=f"{what} {self.title}", completed=done, total=total)

    def advance(self, count: int) -> None:
        """Adds bytes, or raises KeyboardInterrupt if the work should stop."""
        if self.stop.is_set():
            raise KeyboardInterrupt
        if self.task is not None:
            self.progress.advance(self.task, count)

    def say(self, text: str) -> None:
        """Prints a line that stays on the screen."""
        self.progress.console.print(f"{self.title}: {text}", highlight=False)

    def end(self) -> None:
        """Removes the progress line."""
        if self.task is not None:
            self.progress.remove_task(self.task)
            self.task = None


def require_room(folder: Path, needed: int, what: str) -> None:
    """Checks free disk space before a step that needs it.

    Raises:
        DataError: fewer than ``needed`` bytes are free.
    """
    free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
    if needed > free:
        raise DataError(
            "disk full",
            f"{what} needs {needed / 1e9:.2f} GB, '{folder}' has {free / 1e9:.2f} GB free: make room, choose "
            "another --root, or delete archives once unpacked (--drop-archives); then repeat the command to continue",
        )


def in_background(work: Iterator[T], stop: threading.Event, limit: float) -> Generator[T, None, None]:
    """Iterates in a separate thread, so that a slow server can block neither Ctrl-C nor the time limit.

    Raises:
        TimeoutError: the next item took longer than ``limit`` seconds.
        KeyboardInterrupt: ``stop`` is set.
    """
    items: queue.Queue[tuple[T] | Exception | None] = queue.Queue(maxsize=8)
    left = threading.Event()

    def put(item: tuple[T] | Exception | None) -> None:
        while not left.is_set():
            try:
                return items.put(item, timeout=POLL)
            except queue.Full:
                continue

    def run() -> None:
        try:
            for item in work:
                put((item,))
                if left.is_set():
                    return
            put(None)
        except Exception as error:  # noqa: BLE001 - raised again below, in the waiting thread
            put(error)

    threading.Thread(target=run, daemon=True).start()
    waited, pause = 0.0, min(POLL, limit)
    try:
        while True:
            if stop.is_set():
                raise KeyboardInterrupt
            try:
                item = items.get(timeout=pause)
            except queue.Empty:
                waited += pause
                if waited > limit:
                    raise TimeoutError(f"received nothing for {limit:g} s") from None
                continue
            waited = 0.0
            if item is None:
                return
            if isinstance(item, Exception):
                raise item
            yield item[0]
    finally:
        left.set()
