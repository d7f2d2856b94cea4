"""Python's garbage collector, at rest while a process imports large libraries."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Python's garbage collector rests. torch and transformers make so many objects, and next to no garbage, that
    looking for it takes a tenth of a short command."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()
