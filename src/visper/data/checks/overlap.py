"""Images that two sets share, by content: under another name, in another folder, or embedded in Parquet.

The smaller set is hashed, and of the larger one only the images whose size occurs in the smaller.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from visper.common.errors import DataError
from visper.common.files import inside
from visper.data.checks.digests import contents_of, digest
from visper.data.rows.table import Records

_THREADS = 32
Shared = dict[bytes, tuple[str, str]]
"""Digest -> the image's name in the first and in the second set."""


def shared_images(few: Sequence[tuple[str, bytes]], many: Records) -> Shared:
    """The images of ``few`` that are also images of ``many``.

    Args:
        few: name and content of each image.
        many: rows; of their images, only those of the size of one of ``few`` are read.
    """
    names = {digest(content): name for name, content in few}
    sizes = {len(content) for _, content in few}
    found = {own: name for name, own in _candidates(many, sizes) if own in names}
    return {own: (names[own], name) for own, name in found.items()}


def file_images(files: Sequence[Path]) -> list[tuple[str, bytes]]:
    """Path and content of each file."""
    with ThreadPoolExecutor(_THREADS) as threads:
        return list(zip(map(str, files), threads.map(Path.read_bytes, files), strict=True))


def row_images(records: Records, rows: Sequence[int]) -> list[tuple[str, bytes]]:
    """Name and content of the images of some rows, without those that cannot be read."""
    found = []
    for row in rows:
        try:
            contents = contents_of(records, row)
        except DataError:
            continue  # training leaves such a row out
        shown = zip(records[row].images, contents, strict=True)
        found += [(image.path, content) for image, content in shown if content is not None]
    return found


def _candidates(records: Records, sizes: set[int]) -> Iterator[tuple[str, bytes]]:
    """Name and digest of the images that may be equal to one of a size in ``sizes``."""
    files = dict.fromkeys((folder, name) for _, _, folder, name in records.image_files())

    def hashed(place: tuple[Path, str]) -> tuple[str, bytes] | None:
        try:
            path = inside(*place)
            if os.stat(path).st_size not in sizes:  # noqa: PTH116 (see kept.py)
                return None
            return str(path), digest(path.read_bytes())
        except (DataError, OSError):
            return None

    with ThreadPoolExecutor(_THREADS) as threads:
        yield from (found for found in threads.map(hashed, files) if found is not None)
    for part, start in zip(records.parts, records.starts, strict=False):
        if part.embedded is not None:
            own = start + np.asarray(part.embedded.rows_with_sizes(sizes), dtype=np.int64)
            rows = np.flatnonzero(np.isin(records.rows, own))
            for row in sorted(rows.tolist(), key=lambda row: int(records.rows[row])):
                yield from ((name, digest(content)) for name, content in row_images(records, [row]))
