"""The on-disk cache.

A key is part of the file's name and covers everything the content depends on, including the code that computes it, so
a stale file is never read.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

from visper.common.errors import DataError
from visper.common.files import atomic_path, place_of, remove_leftovers

FOLDER = ".visper"
VARIABLE = "VISPER_CACHE"
_BLOCKS, _BLOCK = 16, 1 << 16
_DAY_S = 86_400.0


def cache_folder(beside: Path) -> Path:
    """``$VISPER_CACHE``, else ``.visper`` in the folder ``beside``, else (read-only data) ``~/.cache/visper``.

    Raises:
        DataError: none of these can be written.
    """
    given = os.environ.get(VARIABLE)
    own = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 - does not raise for a user without a home
    places = [Path(given)] if given else [beside / FOLDER] if os.access(beside, os.W_OK) else []
    if not given and not own.startswith("~"):
        places.append(Path(own) / "visper")
    for place in places:
        with suppress(OSError):
            place.mkdir(parents=True, exist_ok=True)
            if os.access(place, os.W_OK):
                return place
    tried = " nor ".join(f"'{place}'" for place in (places if given else [beside, *places[-1:]]))
    raise DataError(
        "no place for the cache", f"{tried} cannot be written: set the variable {VARIABLE} to a writable folder"
    )


@contextmanager
def cache_file(place: Path) -> Iterator[Path]:
    """``atomic_path`` in a cache, which several processes may write without a lock; also removes what writers killed
    more than a day ago have left there."""
    remove_leftovers(place.parent.glob(".*.partial-*"), older_than=_DAY_S)
    with atomic_path(place) as partial:
        yield partial


def hub_cache_remedy(error: OSError) -> str:
    """Advice to append to a message if ``error`` says that the hub's cache cannot be written; else an empty string."""
    from huggingface_hub.constants import HF_HOME

    home, place = Path(HF_HOME), Path(str(error.filename))
    here = place == home or place in home.parents or home in place.parents
    if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM) or not here:
        return ""
    return "; set the variable HF_HOME to a writable folder: models and data sets from the hub are cached there"


def key(*parts: str | bytes | int) -> str:
    """A hash of the parts, 16 hex digits."""
    total = hashlib.sha256()
    for part in parts:
        content = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
        total.update(len(content).to_bytes(8, "little") + content)
    return total.hexdigest()[:16]


def code_key(*modules: ModuleType) -> str:
    """A key of the modules' source code, so that results of another version of it are not reused."""
    return key(*(Path(str(module.__file__)).read_bytes() for module in modules))


def identity(file: Path) -> str:
    """A key of the file's present state, computed in a millisecond whatever its size.

    It covers path, size, modification time, inode change time, and a megabyte of content sampled over the file (all of
    a small one). The inode change time cannot be set by hand, so a changed file of the same size whose old date was
    restored gets another key.

    Raises:
        DataError: the file does not exist.
    """
    try:
        found, content = file.stat(), sample(file)
    except IsADirectoryError as error:
        raise DataError("not a file", f"'{file}' is a folder: name a conversation file (.json or .jsonl)") from error
    except FileNotFoundError as error:
        raise DataError(
            "no such file", f"{place_of(file)}: expected a conversation file (.json or .jsonl); check 'data.sources'"
        ) from error
    return key(str(file.resolve()), found.st_size, found.st_mtime_ns, found.st_ctime_ns, content)


def sample(file: Path) -> str:
    """A key of the file's size and a megabyte of content sampled over it (all of a small one), wherever it is."""
    size = file.stat().st_size
    step = max(_BLOCK, (size - _BLOCK) // (_BLOCKS - 1))
    blocks = []
    with file.open("rb") as content:
        for start in range(0, size, step):
            content.seek(start)
            blocks.append(content.read(_BLOCK))
    return key(size, *blocks)
