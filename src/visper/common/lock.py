"""A lock that lets one process at a time work in a folder.

It is an operating-system lock on ``.lock``, released however its process ends; forked loader processes do not inherit
it (filelock >= 3.30). ``.lock.json`` names the holder, for the error message that a second process gets.
"""

from __future__ import annotations

import errno
import glob
import json
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

from filelock import FileLock, Timeout

from visper.common.console import Console, announce
from visper.common.errors import ConfigError
from visper.common.files import atomic_path, make_folder, remove_leftovers, write_text
from visper.common.ranks import first_decides

LOCK, HOLDER = ".lock", ".lock.json"
PATIENCE_S = 1.0
"""A holder that is killed while it forks leaves the lock to its child, which closes it at once."""
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


class InUseError(ConfigError):
    """Another process holds the folder's lock."""


@contextmanager
def locked(folder: Path, console: Console, wait: bool = False) -> Iterator[None]:
    """Holds the folder's lock. Creates the folder if needed, and then removes it again if nothing was written.

    On a file system without locks, prints a warning and continues without one.

    Args:
        wait: wait for the other process instead of raising an error.

    Raises:
        ConfigError: a file or a dangling link is in the folder's place.
        InUseError: another process holds the lock; the message names its host, process id and start time.
    """
    made = [] if wait else [place for place in (folder, *folder.parents) if not place.exists()]
    make_folder(folder)
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
            console, "warning", f"the file system of '{folder}' has no locks ({error}): do not start a second process"
        )
    try:
        remove_leftovers(folder.glob(f".{HOLDER}.partial-*"))  # of a holder that was killed as it began
        since = f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M:%S} UTC"
        write_text(folder / HOLDER, json.dumps({"host": socket.gethostname(), "process": os.getpid(), "since": since}))
        yield
    finally:
        (folder / HOLDER).unlink(missing_ok=True)
        (folder / LOCK).unlink(missing_ok=True)  # while held: a waiting process then reopens the file
        lock.release()
        _remove_empty(made)


@contextmanager
def locked_by_first(folder: Path, console: Console) -> Iterator[None]:
    """``locked``, held by the first process of a run; if it cannot be held, every process raises the error."""
    with ExitStack() as stack:
        first_decides(lambda: stack.enter_context(locked(folder, console)))
        yield


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """``atomic_path`` for a folder that is in no locked one: also removes what killed writers of ``path`` have left.

    Raises:
        InUseError: another process writes it.
    """
    lock = path.with_name(f".{path.name}.lock")
    with locked(lock, Console()):
        remove_leftovers(path.parent.glob(f".{glob.escape(path.name)}.partial-*"))
        with atomic_path(path) as partial:
            yield partial
    with suppress(OSError):
        lock.rmdir()  # a killed writer's


def _holder(folder: Path) -> str:
    try:
        found = json.loads((folder / HOLDER).read_text(encoding="utf-8"))
        return f"process {found['process']} on host '{found['host']}' since {found['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # not written yet
        return "another process"


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:  # not empty
            return
