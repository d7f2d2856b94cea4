"""Writes rows and their images into a few Parquet files, for file systems that are slow with many small files.

Images are stored in the hub's layout (a struct of bytes and path), conversations as ``messages`` with content parts.
`datasets`, the hub's viewer and other readers open both; training reads the files as ``{parquet: FOLDER/*.parquet}``.
`datasets` memory-maps them, so any process can read any row by its number, and the order of rows and resuming work as
for every other source.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from visper.common.console import track
from visper.common.errors import DataError
from visper.common.lock import new_folder
from visper.data.checks.digests import contents_of
from visper.data.rows.records import Drop, DropList, Record
from visper.data.rows.table import Records

FILE_BYTES = 256 << 20
GROUP_ROWS = 100
"""Rows per row group, the unit that readers load; the hub uses this number for images."""
LEAVE_OUT = "leave the rows out: `visper data check ... --drop FILE`, then --drop-list FILE"
_THREADS = 16


def write_parquet(
    records: Records,
    out: Path,
    drops: DropList,
    file_bytes: int = FILE_BYTES,
    seed: int = 0,
    quiet: bool = True,
    drop_limit: float = 1.0,
) -> list[int]:
    """Writes records and their images into the folder ``out``, in an order shuffled by ``seed``.

    Args:
        records: the good rows. Rows keep their ids; an image of several rows is written with each of them. Images are
            written to a column ``image``, or ``images`` (lists) if any row has several.
        out: a new folder; it appears only when it is complete.
        drops: rows with a missing or empty image file are added to it.
        file_bytes: approximate bytes of images per file.
        drop_limit: largest accepted share of rows in ``drops``; training does not see that they are missing.

    Returns:
        The number of rows in each file.

    Raises:
        DataError: ``out`` exists, or too many rows cannot be written.
    """
    if out.exists():
        raise DataError("folder exists", f"'{out}' exists: remove it, or choose another folder")
    order = np.random.default_rng(seed).permutation(len(records)).tolist()
    counts: list[int] = []
    total = len(records) + len(drops)
    drops.check(total, drop_limit, LEAVE_OUT)  # before hours of writing
    column = "images" if (records.num_images > 1).any() else "image"
    with new_folder(out) as partial, ThreadPoolExecutor(_THREADS) as threads:
        partial.mkdir(parents=True)
        good = _good_rows(threads, records, track(order, description="writing rows", quiet=quiet), drops, column)
        while group := list(islice(good, GROUP_ROWS)):
            file = partial / f"{len(counts):05d}.parquet"
            counts.append(_write_file(file, _schema(column), group, good, file_bytes))
        drops.check(total, drop_limit, LEAVE_OUT)
    return counts


def _schema(column: str) -> pa.Schema:
    from datasets import Features, Image, Value

    text, image = Value("string"), [Image()] if column == "images" else Image()
    content = [{"type": text, "text": text}]
    return Features({"id": text, column: image, "messages": [{"role": text, "content": content}]}).arrow_schema


def _write_file(
    file: Path, schema: pa.Schema, group: list[dict[str, Any]], rows: Iterator[dict[str, Any]], file_bytes: int
) -> int:
    """Writes ``group`` and further groups from ``rows`` until the file is large enough; returns its number of rows."""
    count, size = 0, 0
    # Images are already compressed, and dictionary encoding would keep each of them twice in memory.
    with pq.ParquetWriter(file, schema, compression="none", use_dictionary=False) as writer:
        while group:
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
            count += len(group)
            size += sum(map(_image_bytes, group))
            group = [] if size >= file_bytes else list(islice(rows, GROUP_ROWS))
    return count


def _image_bytes(row: dict[str, Any]) -> int:
    images = row["images"] if "images" in row else [row["image"]]
    return sum(len(image["bytes"]) for image in images if image)


def _good_rows(
    threads: ThreadPoolExecutor, records: Records, order: Iterable[int], drops: DropList, column: str
) -> Iterator[dict[str, Any]]:
    """The good rows in order, read in small batches to keep few images in memory; others are added to ``drops``."""
    indices = iter(order)
    while some := list(islice(indices, 4 * _THREADS)):
        for row in threads.map(lambda index: _row(records, index, column), some):
            if isinstance(row, Drop):
                drops.extend([row])
            else:
                yield row


def _row(records: Records, index: int, column: str) -> dict[str, Any] | Drop:
    part, place = records.place(index)
    record = records[index]
    try:
        contents = contents_of(records, index)
    except DataError as error:
        return Drop(record.id, error.reason, error.detail)
    for image, content in zip(record.images, contents, strict=True):
        if content is None:
            return Drop(record.id, "missing image", f"'{image.path}': expected a file")
        if not content:
            return Drop(record.id, "empty image file", f"'{image.path}' has no bytes: fetch it again")
    names = (image.path for image in part.table.images(place))
    images = [{"bytes": content, "path": name} for content, name in zip(contents, names, strict=True)]
    return {
        "id": part.table.value("id", place),
        column: images if column == "images" else next(iter(images), None),
        "messages": [{"role": turn.role, "content": _parts(record, i)} for i, turn in enumerate(record.turns)],
    }


def _parts(record: Record, number: int) -> list[dict[str, str]]:
    """A turn as content parts. Tags in a text would not do: the whitespace around such a text is not read."""
    text, at = record.turns[number].text, 0
    parts = []
    for image in record.images:
        if image.turn == number:
            parts += [{"type": "text", "text": text[at : image.at]}, {"type": "image"}]
            at = image.at
    parts.append({"type": "text", "text": text[at:]})
    return [part for part in parts if part.get("text") != "" or len(parts) == 1]
