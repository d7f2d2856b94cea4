"""Rows and their images in a few Parquet files, for file systems that suffer from many small ones.

The layout is the hub's own for images (a struct of bytes and path), so that `datasets`, the hub's viewer and any other
reader open it; training reads it as ``{parquet: FOLDER/*.parquet}``. `datasets` maps the files' rows into memory, so a
row has a number and any process reads any row: the order, and continuing in it, are those of every other source.
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
from visper.common.files import atomic_path, inside
from visper.data.rows.formats import IMAGE_TAG
from visper.data.rows.records import Drop, DropList
from visper.data.rows.table import Records

FILE_BYTES = 256 << 20
GROUP_ROWS = 100
"""Rows of a row group, which readers load at once: the hub's choice for images."""
_SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt"}
_THREADS = 16


def write_parquet(
    records: Records, out: Path, drops: DropList, file_bytes: int = FILE_BYTES, seed: int = 0, quiet: bool = True
) -> list[int]:
    """Writes records and their images into the folder ``out``, in an order shuffled by ``seed``.

    Args:
        records: the good rows. Each keeps its id; an image that several rows show is written with each of them.
        out: a new folder; it appears only once everything is in it.
        drops: takes the rows whose image file is missing or empty.
        file_bytes: of images in a file, about.
        quiet: no progress bar.

    Returns:
        The rows of each file.

    Raises:
        DataError: ``out`` exists, or not one row can be written.
    """
    if out.exists():
        raise DataError("folder exists", f"'{out}' is already there: remove it, or name another folder")
    order = np.random.default_rng(seed).permutation(len(records)).tolist()
    counts: list[int] = []
    with atomic_path(out) as partial, ThreadPoolExecutor(_THREADS) as threads:
        partial.mkdir(parents=True)
        good = _good_rows(threads, records, track(order, description="writing rows", quiet=quiet), drops)
        while group := list(islice(good, GROUP_ROWS)):
            counts.append(_write_file(partial / f"{len(counts):05d}.parquet", group, good, file_bytes))
        if not counts:
            raise DataError("no rows", f"none of the {len(records)} rows could be written: {drops.counts()}")
    return counts


def _schema() -> pa.Schema:
    from datasets import Features, Image, Value

    text = Value("string")
    return Features({"id": text, "image": Image(), "conversations": [{"from": text, "value": text}]}).arrow_schema


def _write_file(file: Path, group: list[dict[str, Any]], rows: Iterator[dict[str, Any]], file_bytes: int) -> int:
    """Writes ``group`` and further groups from ``rows`` until the file is large enough; returns its rows."""
    schema, count, size = _schema(), 0, 0
    # Images are compressed already, and a dictionary of them would hold each twice.
    with pq.ParquetWriter(file, schema, compression="none", use_dictionary=False) as writer:
        while group:
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
            count += len(group)
            size += sum(len(row["image"]["bytes"]) for row in group if row["image"])
            group = [] if size >= file_bytes else list(islice(rows, GROUP_ROWS))
    return count


def _good_rows(
    threads: ThreadPoolExecutor, records: Records, order: Iterable[int], drops: DropList
) -> Iterator[dict[str, Any]]:
    """The rows in order, read some at a time, so that memory holds few images; the others go to ``drops``."""
    indices = iter(order)
    while some := list(islice(indices, 4 * _THREADS)):
        for row in threads.map(lambda index: _row(records, index), some):
            if isinstance(row, Drop):
                drops.extend([row])
            else:
                yield row


def _row(records: Records, index: int) -> dict[str, Any] | Drop:
    part, place = records.place(index)
    record = records[index]
    tagged = bool(part.table.value("image_tags", place))
    conversations = [{"from": _SPEAKERS[turn.role], "value": turn.text} for turn in record.turns]
    row: dict[str, Any] = {"id": part.table.value("id", place), "image": None, "conversations": conversations}
    if record.image is None:
        return row
    if tagged and record.image_turn is not None:  # where the row had none, its text stays untouched
        shown_in = conversations[record.image_turn]
        shown_in["value"] = f"{IMAGE_TAG}\n{shown_in['value']}"
    content, file = records.embedded_image(index), records.image_place(index)
    if content is None and file is not None:
        try:
            content = inside(*file).read_bytes()
        except DataError as error:
            return Drop(record.id, error.reason, error.detail)
        except OSError as error:
            return Drop(record.id, "missing image", f"'{record.image}': {error.strerror}")
    if not content:
        return Drop(record.id, "empty image file", f"'{record.image}' has no bytes: fetch it again")
    row["image"] = {"bytes": content, "path": part.table.value("image", place)}
    return row
