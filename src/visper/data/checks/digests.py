"""Digests that identify images by content, whatever the file's name, place or date.

Digests of files are kept on disk (``kept``); a file is hashed again only if it has changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from visper.common.console import track
from visper.common.errors import DataError
from visper.common.files import inside
from visper.data.checks.kept import of_files
from visper.data.rows.table import Records

DIGEST_BYTES = 16
LOCKFILE = "digests.jsonl"
_THREADS, _AT_ONCE = 16, 512


def digest(content: bytes) -> bytes:
    """The first 16 bytes of a content's SHA-256."""
    return hashlib.sha256(content).digest()[:DIGEST_BYTES]


def image_id(content: bytes) -> int:
    """A 64-bit number from the content's digest; two contents in a batch collide with a probability of about 1e-13."""
    return int.from_bytes(digest(content)[:8], "little", signed=True)


def contents_of(records: Records, index: int) -> list[bytes | None]:
    """The bytes of a row's images, embedded or read from files; None for a file that does not exist.

    Raises:
        DataError: a file is not inside its source's images folder, or an image is not embedded in its source.
    """
    part, row = records.place(index)
    images = part.table.images(row)
    if part.images is not None:
        return [_read_file(inside(part.images, image.path)) for image in images]
    held = part.embedded(row) if part.embedded is not None and images else []
    if len(held) != len(images):
        raise DataError("image not embedded", f"the source contains {len(held)} of the row's {len(images)} images")
    return list(held)


def _read_file(path: Path) -> bytes | None:
    try:
        return path.read_bytes() if path.is_file() else None
    except OSError:
        return None


def digests_of(records: Records, quiet: bool = True) -> dict[tuple[int, int], bytes | None]:
    """The digest of every image by row index and number in the row, sorted; None if the file does not exist."""
    files = {(index, number): (folder, name) for index, number, folder, name in records.image_files()}
    lockfile = records.parts[0].table.path.parent / LOCKFILE
    kept, _ = of_files(list(dict.fromkeys(files.values())), lockfile, partial(_hashes, quiet=quiet))
    of_file = {path: bytes.fromhex(own) for path, (own,) in kept.items()}
    found = {place: of_file.get(str(folder / name)) for place, (folder, name) in files.items()}
    embedded = [i for i, has in enumerate(records.has_image.tolist()) if has and (i, 0) not in files]
    # In the order of the files, which are read in groups of rows.
    order = sorted(embedded, key=lambda index: int(records.rows[index]))
    for index in track(order, description="hashing embedded images", quiet=quiet or not order):
        try:
            contents = contents_of(records, index)
        except DataError:
            continue  # training leaves such a row out
        found |= {(index, number): digest(held) for number, held in enumerate(contents) if held is not None}
    return dict(sorted(found.items()))


def _hashes(paths: list[str], quiet: bool) -> Iterator[list[str] | None]:
    with ThreadPoolExecutor(_THREADS) as threads:
        some = (paths[start : start + _AT_ONCE] for start in range(0, len(paths), _AT_ONCE))
        found = (own for each in some for own in threads.map(_hash, each))
        yield from track(found, description="hashing images", total=len(paths), quiet=quiet)


def _hash(path: str) -> list[str] | None:
    content = _read_file(Path(path))
    return None if content is None else [digest(content).hex()]
