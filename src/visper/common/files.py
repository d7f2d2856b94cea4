"""Files and folders that are complete or absent, and names that stay inside their folder.

What is written lies beside its place until it is complete and on the disk, then takes its place by a rename. Promised:

- Whoever opens a file sees its former content or the new one, also after a kill or a power loss at any moment.
- Any error, a full disk included, leaves what was there before.
- Two writers never share an unfinished file, on whichever host or in whichever container they run; the last one wins.
- A folder is replaced by two renames, so it is absent for a moment; if the second fails, the former folder is put back,
  and if the process dies between them, ``remove_leftovers`` puts it back.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from visper.common.errors import DataError

OUTSIDE = "image outside its folder"
"""The reason under which rows are counted whose image is not under the images folder."""
_LONGEST_NAME = 255  # bytes, on every usual file system
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<kind>partial|old)-(?P<host>.+)-[0-9a-f]{16}", re.DOTALL)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A sibling path to write a file or a folder to; on success it becomes ``path``, on any error it vanishes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _sibling(path, "partial")
    try:
        yield partial
        _open_to_readers(partial)
        flush(partial)
        _take_place(partial, path)
    except BaseException:
        _remove(partial)
        raise
    flush_names(path.parent)


def _open_to_readers(path: Path) -> None:
    """Gives files the mode that any program's new file has here: safetensors makes its own readable to nobody else."""
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
    """Writes a text file completely, or leaves ``path`` as it was."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def is_leftover(path: Path) -> bool:
    """Whether a file or folder is one that ``atomic_path``, here or on another host, has not moved to its place."""
    return _LEFTOVER.fullmatch(path.name) is not None


def remove_leftovers(found: Iterable[Path]) -> None:
    """Removes what killed writers of this host left; a folder set aside returns to its place if that is empty.

    The caller holds the lock under which these places are written: a process's id would say nothing about a process
    in another container. What other hosts left stays, since a lock on a network file system may not reach them.

    Args:
        found: paths, for example of a ``glob``; those that are no leftovers of this host are passed over.
    """
    for leftover in list(found):
        match = _LEFTOVER.fullmatch(leftover.name)
        if match is None or match["host"] != socket.gethostname():
            continue
        place = leftover.with_name(match["name"])
        if match["kind"] == "old" and not os.path.lexists(place):
            leftover.rename(place)
        else:
            _remove(leftover)


def inside(folder: str | Path, name: str) -> Path:
    """The file ``name`` of a folder of images, which lies under it when every link on the way is followed.

    Cheap enough for each image of a run: the links of a folder are followed once in a process, a file's each time.

    Raises:
        DataError: ``name`` leads outside, by ``..``, as an absolute path or through a link.
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
            "that holds it as the images folder",
        )
    return Path(folder) / name


@lru_cache(maxsize=100_000)
def _followed(folder: str) -> str:
    return os.path.realpath(folder)


def flush(path: Path) -> None:
    """Waits until a file, or a folder with all it holds, is on the disk."""
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
    """Waits until the names in a folder are on the disk, where its file system can tell."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems flush no folders
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
