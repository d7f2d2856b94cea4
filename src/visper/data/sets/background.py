"""Long work that a person sees and can stop: a progress bar, reading in a thread, a look at the disk."""

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
"""Seconds between two looks at whether the work should stop."""


class ProgressBar:
    """One line of the progress display; also where a download learns that it should stop."""

    def __init__(self, progress: Progress, stop: threading.Event, title: str) -> None:
        self.progress, self.stop, self.title = progress, stop, title
        self.task: TaskID | None = None

    def show(self, what: str, done: int, total: int | None) -> None:
        """Shows a step at ``done`` of ``total`` bytes."""
        if self.task is None:
            self.task = self.progress.add_task(self.title, total=total)
        self.progress.update(self.task, description=f"{what} {self.title}", completed=done, total=total)

    def advance(self, count: int) -> None:
        """Adds bytes, or stops the work."""
        if self.stop.is_set():
            raise KeyboardInterrupt
        if self.task is not None:
            self.progress.advance(self.task, count)

    def say(self, text: str) -> None:
        """A line that stays."""
        self.progress.console.print(f"{self.title}: {text}", highlight=False)

    def end(self) -> None:
        """Takes the line away."""
        if self.task is not None:
            self.progress.remove_task(self.task)
            self.task = None


def require_room(folder: Path, needed: int, what: str) -> None:
    """Refuses to begin what the disk cannot hold.

    Raises:
        DataError: fewer than ``needed`` bytes are free.
    """
    free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
    if needed > free:
        raise DataError(
            "disk full",
            f"{what} needs {needed / 1e9:.2f} GB, '{folder}' has {free / 1e9:.2f} GB free: make room, choose "
            "another --root, or drop archives once unpacked (--drop-archives); what is there stays, repeat to go on",
        )


def in_background(work: Iterator[T], stop: threading.Event, limit: float) -> Generator[T, None, None]:
    """Iterates in a thread of its own: a server that sends a byte at a time holds up neither Ctrl-C nor the limit.

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
        except Exception as error:  # noqa: BLE001 - raised again below, in the thread that waits
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
                    raise TimeoutError(f"nothing came for {limit:g} s") from None
                continue
            waited = 0.0
            if item is None:
                return
            if isinstance(item, Exception):
                raise item
            yield item[0]
    finally:
        left.set()
