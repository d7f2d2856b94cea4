"""One process at a time in a folder.

The operating system's lock on ``.lock`` decides, and ends with the process that holds it, however that ends: forked
loader processes do not inherit it (filelock >= 3.30). ``.lock.json`` says who holds it, for whoever is refused.
"""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from pathlib import Path

from filelock import FileLock, Timeout

from visper.common.console import Console, announce
from visper.common.errors import ConfigError
from visper.common.files import write_text
from visper.common.ranks import first_decides

LOCK, HOLDER = ".lock", ".lock.json"
PATIENCE_S = 1.0
"""For a holder that was killed while it forked: its child closes the lock first thing."""
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


class InUseError(ConfigError):
    """Another process holds a folder."""


@contextmanager
def locked(folder: Path, console: Console, wait: bool = False) -> Iterator[None]:
    """Holds the folder's lock; creates the folder, and removes it again if nothing was written.

    Where the file system has no locks it says so and goes on without one.

    Args:
        wait: until the holder has ended, instead of an error.

    Raises:
        InUseError: another process holds it; the message names its host, process id and start.
    """
    made = [] if wait else [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, fallback_to_soft=False)
    try:
        try:
            lock.acquire(timeout=PATIENCE_S)
        except Timeout:
            if not wait:
                raise InUseError(
                    f"'{folder}' is in use by {_holder(folder)}: wait for it to end, stop it, or choose another folder"
                ) from None
            console.print(f"'{folder}' is in use by {_holder(folder)}: waiting for it to end", soft_wrap=True)
            lock.acquire()
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        announce(
            console, "warning", f"the file system of '{folder}' has no locks ({error}): start no second process on it"
        )
    try:
        since = f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M:%S} UTC"
        write_text(folder / HOLDER, json.dumps({"host": socket.gethostname(), "process": os.getpid(), "since": since}))
        yield
    finally:
        (folder / HOLDER).unlink(missing_ok=True)
        (folder / LOCK).unlink(missing_ok=True)  # while it is held: whoever has opened it opens the next one
        lock.release()
        _remove_empty(made)


@contextmanager
def locked_by_first(folder: Path, console: Console) -> Iterator[None]:
    """``locked``, held by the first process of a run; where that is refused, every process raises the error."""
    with ExitStack() as stack:
        first_decides(lambda: stack.enter_context(locked(folder, console)))
        yield


def _holder(folder: Path) -> str:
    try:
        found = json.loads((folder / HOLDER).read_text(encoding="utf-8"))
        return f"process {found['process']} on host '{found['host']}' since {found['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has not been written yet
        return "another process"


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:  # something is in it
            return
