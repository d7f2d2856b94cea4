"""Atomic writes of files and folders, and a check that a name stays inside its folder.

A file or folder is written under a temporary name next to its destination, flushed to disk, then renamed. Guarantees:

- A reader sees either the old or the new content, even after a kill or a power loss at any moment.
- Any error, including a full disk, leaves the old content in place.
- Two writers never share a temporary file, even on different hosts or in different containers; the last one wins.
- A folder is replaced by two renames, so it is absent for a moment. If the second rename fails, the old folder is
  restored; if the process dies between the two, ``remove_leftovers`` restores it.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from visper.common.errors import ConfigError, DataError

OUTSIDE = "image outside its folder"
"""The ``DataError`` reason for a row whose image is not under the images folder."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
_WRITING = (*_FULL, errno.EFBIG, errno.EROFS)
"""Errors of writing, which name no file if they come from an open one."""
_LONGEST_NAME = 255  # bytes, on every usual file system
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<kind>partial|old)-(?P<host>.+)-[0-9a-f]{16}", re.DOTALL)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a sibling path to write a file or folder to; it is renamed to ``path``, or removed on any error.

    Raises:
        ConfigError: a file was written, and ``path`` is a folder; ``path`` is a dangling link, or in no folder.
        OSError: the disk is full, or the like, also where safetensors raises its own error. It names ``path``.
    """
    refuse_dangling_link(path)
    make_folder(path.parent)
    partial = _sibling(path, "partial")
    try:
        yield partial
        _open_to_readers(partial)
        flush(partial)
        _take_place(partial, path)
    except BaseException as error:
        if os.path.lexists(partial):  # on a read-only disk, removing even what does not exist is an error
            _remove(partial)
        named = _naming(path, partial, error)
        if named is not None:
            raise named from error
        raise
    flush_names(path.parent)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Lets an error about a full disk or the like, raised while an open file is written, name ``path``."""
    try:
        yield
    except OSError as error:
        named = _naming(path, path, error)
        if named is not None:
            raise named from error
        raise


def _naming(path: Path, partial: Path, error: BaseException) -> OSError | None:
    """The error with ``path`` as its file, if it is about ``partial`` or about writing and names no file."""
    number = _operating_system_error(error)
    if number is not None:
        return OSError(number, os.strerror(number), str(path))
    if not isinstance(error, OSError):
        return None
    unnamed = error.filename is None and error.errno in _WRITING
    if error.errno is not None and (unnamed or partial.name in str(error)):
        return OSError(error.errno, os.strerror(error.errno), str(path))
    return None


def remedy_of(error: OSError) -> str:
    """Advice to append to a message, if a place is full or cannot be written; else an empty string."""
    if error.errno in _FULL:
        return "; free some space, or choose another place"
    if error.errno == errno.EROFS:
        return "; choose a place that can be written"
    return "; check its permissions, or choose another place" if error.errno == errno.EACCES else ""


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it, unless they exist.

    Raises:
        ConfigError: a file or a dangling link is in the place of one of them.
    """
    refuse_dangling_link(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(
            f"'{folder}' or a part of its path is a file: expected a folder, choose another place"
        ) from error


def refuse_dangling_link(path: Path) -> None:
    """Raises ConfigError if ``path``, or a folder above it, is a link to a place that does not exist."""
    for place in (path, *path.parents):
        if place.is_symlink() and not place.exists():
            target = place.readlink()
            raise ConfigError(
                f"'{place}' is a link to '{target}', which does not exist: create it, or choose another place"
            )


def _operating_system_error(error: BaseException) -> int | None:
    """The number in safetensors' error about a full disk or the like, which is not an ``OSError``."""
    from safetensors import SafetensorError

    found = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, SafetensorError) else None
    return int(found[1]) if found else None


def _open_to_readers(path: Path) -> None:
    """Gives new files the default mode (umask): safetensors creates files that only their owner can read."""
    mode = 0o666 & ~_umask()
    for file in path.rglob("*") if path.is_dir() else (path,):
        if file.is_file() and not file.is_symlink() and file.stat().st_mode & 0o777 == 0o600:
            file.chmod(mode)


def _umask() -> int:
    status = Path("/proc/self/status")
    if status.is_file():
        found = re.search(r"^Umask:\s*([0-7]+)", status.read_text(), re.MULTILINE)
        if found is not None:
            return int(found[1], 8)
    mask = os.umask(0)  # the only other way to read it is to set it
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically, as UTF-8."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def read_json_object(file: Path) -> dict[str, Any]:
    """The content of a JSON file that came from elsewhere, so that a download may have been interrupted.

    Raises:
        ConfigError: it is not a JSON object.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ConfigError(f"'{file}' is cut short or not a JSON object: download or copy it again")
    return content


def place_of(path: str | Path) -> str:
    """A path for a message about something missing: quoted, and if it is relative, with what it is relative to."""
    return f"'{path}'" + ("" if Path(path).is_absolute() else f" (relative to the current folder, '{Path.cwd()}')")


def is_leftover(path: Path) -> bool:
    """Whether the name is a temporary one of ``atomic_path``, of this host or another."""
    return _LEFTOVER.fullmatch(path.name) is not None


def remove_leftovers(found: Iterable[Path], older_than: float = 0) -> None:
    """Removes the temporary files of killed writers of this host; restores a folder whose replacement never arrived.

    The caller must hold the lock that guards these paths: a process id would not identify a process in another
    container. Leftovers of other hosts are kept, since a lock on a network file system may not reach those hosts.

    Args:
        found: paths, for example from ``glob``; those that are not leftovers of this host are ignored.
        older_than: seconds since the last write after which its writer is dead, where no lock guards the paths.
    """
    for leftover in list(found):
        match = _LEFTOVER.fullmatch(leftover.name)
        if match is None or match["host"] != socket.gethostname():
            continue
        if older_than and not _is_older(leftover, older_than):
            continue
        place = leftover.with_name(match["name"])
        if match["kind"] == "old" and not os.path.lexists(place):
            leftover.rename(place)
        else:
            _remove(leftover)


def _is_older(path: Path, seconds: float) -> bool:
    try:
        return time.time() - path.stat().st_mtime > seconds
    except FileNotFoundError:  # its writer has finished
        return False


def inside(folder: str | Path, name: str) -> Path:
    """The path of ``name`` in an images folder, after checking that it stays there when all links are resolved.

    Cheap enough for every image of a run: links of a folder are resolved once per process, those of a file each time.

    Raises:
        DataError: ``name`` leads outside through ``..``, an absolute path or a link.
    """
    base = str(folder) if os.path.isabs(folder) else os.path.abspath(folder)  # noqa: PTH100, PTH117 - Path is slow
    parent, last = os.path.split(os.path.join(base, name))  # noqa: PTH118
    found = f"{_followed(parent)}/{last}"
    if last in ("", ".", "..") or os.path.islink(found):  # noqa: PTH114
        found = os.path.realpath(found)
    root = _followed(base)
    if not found.startswith(root.rstrip("/") + "/"):
        raise DataError(
            OUTSIDE,
            f"{name[:200]!r} leads to '{found[:200]}', not under '{root}': copy or mount it there, or name the folder "
            "that contains it as the images folder",
        )
    return Path(folder) / name


@lru_cache(maxsize=100_000)
def _followed(folder: str) -> str:
    return os.path.realpath(folder)


def flush(path: Path) -> None:
    """Flushes a file, or a folder with all its content, to disk."""
    if path.is_symlink():
        return
    if path.is_dir():
        for entry in path.iterdir():
            flush(entry)
        flush_names(path)
        return
    with path.open("rb") as file:
        os.fsync(file.fileno())


def flush_names(folder: Path) -> None:
    """Flushes a folder's directory entries to disk, where the file system supports it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot flush folders
            raise
    finally:
        os.close(descriptor)


def _sibling(path: Path, kind: str) -> Path:
    ending = f".{kind}-{socket.gethostname()}-{secrets.token_hex(8)}"
    room = _LONGEST_NAME - len(os.fsencode(f".{ending}"))
    return path.with_name(f".{os.fsencode(path.name)[:room].decode(errors='ignore')}{ending}")


def _take_place(partial: Path, path: Path) -> None:
    if not path.is_dir():
        partial.replace(path)
        return
    if not partial.is_dir():
        raise ConfigError(f"'{path}' is a folder, and a file would be written there: name a file")
    outgoing = _sibling(path, "old")
    path.rename(outgoing)
    try:
        partial.rename(path)
    except BaseException:
        outgoing.rename(path)
        raise
    _remove(outgoing)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
