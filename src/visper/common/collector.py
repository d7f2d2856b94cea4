"""Pausing Python's garbage collector while a process imports large libraries."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Disables Python's garbage collector in the block. Importing torch and transformers creates many objects and
    almost no garbage, and searching for it takes a tenth of a short command's time."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()
