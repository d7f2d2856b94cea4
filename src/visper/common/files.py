"""Complete or absent: what is written lies beside its place until it is whole, then takes it by one rename."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A sibling path to write a file or a folder to; on success it becomes ``path``, on any error it vanishes.

    An existing ``path`` is replaced only once the new one is whole: a full disk loses nothing that was there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    _remove(partial)
    try:
        yield partial
    except BaseException:
        _remove(partial)
        raise
    if path.is_dir():
        outgoing = path.with_name(f".{path.name}.old-{os.getpid()}")
        path.rename(outgoing)
        partial.rename(path)
        _remove(outgoing)
    else:
        partial.replace(path)


def remove_leftovers(path: Path) -> None:
    """Removes what processes of this machine left beside ``path`` when they were killed writing it."""
    for partial in path.parent.glob(f".{glob.escape(path.name)}.partial-*"):
        process = partial.name.rpartition("-")[2]
        if process.isdecimal() and not _is_alive(int(process)):
            _remove(partial)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # of another user
    return True


def write_text(path: Path, text: str) -> None:
    """Writes a whole text file or leaves ``path`` as it was."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
