"""Rows with their pictures in a few large files, for file systems that suffer from many small ones, or from afar.

Parquet, by pyarrow: the format that every tool and the hub's viewer read, with the rows in random order and the
pictures' files as they were. Row groups are small, so one row costs a millisecond and shuffled reading is cheap. The
texts become a local ``RecordTable`` once; only pictures are streamed, whole shards at a time. Because a row keeps its
number, the position in the data is the step, as for any other source: nothing else is saved to continue exactly.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from rich.progress import track

from visper.common.cache import cache_folder, key
from visper.common.errors import DataError
from visper.common.files import atomic_path, remove_leftovers, write_text
from visper.data.rows.records import Drop, DropList
from visper.data.rows.table import SCHEMA, Part, Records, RecordTable, write_table

INDEX = "index.json"
FORMAT = "visper-shards-1"
GROUP_ROWS = 16
SHARD_BYTES = 256 << 20
_AT_ONCE = 32 * GROUP_ROWS  # rows read together: a multiple, so that only a shard's last group is smaller
_OPEN_SHARDS, _OPEN_GROUPS, _THREADS = 3, 8, 16
TEXT_COLUMNS = [name for name in SCHEMA.names if name not in ("reason", "detail")]
PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SHARD_SCHEMA = pa.schema([*(SCHEMA.field(name) for name in TEXT_COLUMNS), ("picture", PICTURE)])


@dataclass(frozen=True)
class Shard:
    """One file: its name, rows and content."""

    file: str
    rows: int
    sha256: str


def write_shards(
    records: Records, out: Path, drops: DropList, shard_bytes: int = SHARD_BYTES, seed: int = 0, quiet: bool = True
) -> list[Shard]:
    """Writes records and their pictures into the folder ``out``, in an order shuffled by ``seed``; whole or not at all.

    A row keeps its id and gets a new number. Rows without a picture file go to ``drops``.

    Args:
        records: the good rows.
        out: a new folder; copy it wherever fsspec reaches.
        drops: takes the rows whose picture is missing or empty.
        shard_bytes: of pictures in a shard, about.
        seed: of the order.
        quiet: no progress bar.

    Raises:
        DataError: not one row can be written.
    """
    if out.exists():
        raise DataError("shards exist", f"'{out}' is already there: remove it, or name another folder")
    remove_leftovers(out)
    order = np.random.default_rng(seed).permutation(len(records))
    with atomic_path(out) as partial, ThreadPoolExecutor(_THREADS) as threads, _Writer(partial, shard_bytes) as writer:
        partial.mkdir(parents=True)
        waiting: list[dict[str, Any]] = []
        for start in track(range(0, len(order), _AT_ONCE), description="writing shards", disable=quiet):
            cells = threads.map(lambda index: _cells(records, index), order[start : start + _AT_ONCE].tolist())
            for cell in cells:
                if isinstance(cell, Drop):
                    drops.add(cell.sample_id, cell.reason, cell.detail)
                else:
                    waiting.append(cell)
            if len(waiting) >= _AT_ONCE:
                writer.write(waiting[:_AT_ONCE])
                waiting = waiting[_AT_ONCE:]
        if waiting:
            writer.write(waiting)
        writer.end_shard()
        shards = writer.shards
        if not shards:
            raise DataError("no rows", f"none of the {len(records)} rows could be written: {drops.counts()}")
        index = {"format": FORMAT, "rows": sum(shard.rows for shard in shards), "shards": [asdict(s) for s in shards]}
        write_text(partial / INDEX, json.dumps(index, indent=1))
    return shards


class _Writer:
    """Begins a new shard wherever one has enough."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self.folder = folder
        self.shard_bytes = shard_bytes
        self.shards: list[Shard] = []
        self._open: pq.ParquetWriter | None = None
        self._rows = self._bytes = 0

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *error: object) -> None:
        if self._open is not None:
            self._open.close()

    def write(self, rows: list[dict[str, Any]]) -> None:
        if self._open is None:
            # Pictures are compressed already, and a dictionary of them would hold each twice.
            self._open = pq.ParquetWriter(self._file(), SHARD_SCHEMA, compression="none", use_dictionary=False)
        self._open.write_table(pa.Table.from_pylist(rows, schema=SHARD_SCHEMA), row_group_size=GROUP_ROWS)
        self._rows += len(rows)
        self._bytes += sum(len(row["picture"]["bytes"]) for row in rows if row["picture"])
        if self._bytes >= self.shard_bytes:
            self.end_shard()

    def end_shard(self) -> None:
        if self._open is not None:
            self._open.close()
            self.shards.append(Shard(self._file().name, self._rows, _sha256(self._file())))
            self._open, self._rows, self._bytes = None, 0, 0

    def _file(self) -> Path:
        return self.folder / f"{len(self.shards):05d}.parquet"


def _cells(records: Records, index: int) -> dict[str, Any] | Drop:
    part, row = records.place(index)
    cells: dict[str, Any] = {name: part.table.value(name, row) for name in TEXT_COLUMNS}
    cells["picture"] = None
    if cells["image"] is None:
        return cells
    content = records.picture(index)
    if content is None:
        record = records[index]
        assert record.image is not None
        try:
            content = Path(record.image).read_bytes()
        except OSError as error:
            return Drop(record.id, "missing image", f"'{record.image}': {error.strerror}")
        if not content:
            return Drop(record.id, "empty image file", f"'{record.image}' has no bytes: fetch it again")
    cells["picture"] = {"bytes": content, "path": cells["image"]}
    return cells


def _sha256(file: Path) -> str:
    total = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(1 << 22):
            total.update(block)
    return total.hexdigest()


def open_shards(address: str, name: str) -> Part:
    """A folder of shards, here or at an address that fsspec knows, as a source.

    Raises:
        DataError: there are no shards of ours.
    """
    system, root = url_to_fs(address)
    try:
        content = system.cat_file(f"{root}/{INDEX}")
        index = json.loads(content)
        if index["format"] != FORMAT:
            raise ValueError(f"its format is {index['format']!r}, expected {FORMAT!r}")
        shards = [Shard(**shard) for shard in index["shards"]]
    except FileNotFoundError as error:
        raise DataError(
            "no such shards", f"'{address}' holds no {INDEX}: make it by `visper data shard`, check 'data.sources'"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError("not shards", f"'{address}/{INDEX}': {error}; make it again by `visper data shard`") from error
    here = isinstance(system, LocalFileSystem)
    folder = cache_folder(Path(root) if here else Path("/"))
    pictures = ShardPictures(address, tuple(shards), folder / f"{name}-{key(address, content)}")
    place = pictures.fetched.with_name(f"{pictures.fetched.name}-{key(*map(str, SCHEMA))}.arrow")
    if not place.is_file():
        write_table(_texts(system, root, shards), place)
    return Part(name, RecordTable(place), None, pictures)


def _texts(system: Any, root: str, shards: list[Shard]) -> Iterator[dict[str, Any]]:
    for shard in shards:
        with system.open(f"{root}/{shard.file}") as stream, pq.ParquetFile(stream) as file:
            for batch in file.iter_batches(columns=TEXT_COLUMNS):
                yield from batch.to_pylist()


class ShardPictures:
    """Row -> the content of its picture. Each process keeps a few shards open, and fetches those from afar whole.

    Args:
        address: the folder of the shards.
        shards: of the index.
        fetched: folder for shards from afar; what is no longer read is removed from it.
    """

    def __init__(self, address: str, shards: tuple[Shard, ...], fetched: Path) -> None:
        self.address = address
        self.shards = shards
        self.fetched = fetched
        self.starts = np.cumsum([0, *(shard.rows for shard in shards)])
        self._files: OrderedDict[int, pq.ParquetFile] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int], pa.Array] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.address, self.shards, self.fetched)

    def __call__(self, row: int) -> bytes | None:
        """The picture's file as it was; None for a row without one.

        Raises:
            DataError: the shard cannot be read.
        """
        shard = int(np.searchsorted(self.starts, row, side="right")) - 1
        group, at = divmod(row - int(self.starts[shard]), GROUP_ROWS)
        if (shard, group) not in self._groups:
            column = self._file(shard).read_row_group(group, columns=["picture.bytes"]).column(0).combine_chunks()
            self._groups[shard, group] = column.field("bytes") if pa.types.is_struct(column.type) else column
            if len(self._groups) > _OPEN_GROUPS:
                self._groups.popitem(last=False)
        self._groups.move_to_end((shard, group))
        content: bytes | None = self._groups[shard, group][at].as_py()
        return content

    def blocks(self) -> npt.NDArray[np.int64]:
        """The shard of each row, ``[rows]``."""
        return np.repeat(np.arange(len(self.shards)), [shard.rows for shard in self.shards])

    def _file(self, number: int) -> pq.ParquetFile:
        if number not in self._files:
            try:
                self._files[number] = pq.ParquetFile(self._local(self.shards[number]), memory_map=True)
            except (OSError, pa.ArrowException) as error:
                place = f"{self.address}/{self.shards[number].file}"
                raise DataError("broken shard", f"'{place}': {error}; copy it again") from error
            if len(self._files) > _OPEN_SHARDS:
                old, file = self._files.popitem(last=False)
                file.close()
                # Another process that still reads it has it open, or fetches it again.
                (self.fetched / self.shards[old].file).unlink(missing_ok=True)
        self._files.move_to_end(number)
        return self._files[number]

    def _local(self, shard: Shard) -> Path:
        system, root = url_to_fs(self.address)
        if isinstance(system, LocalFileSystem):
            return Path(root) / shard.file
        place = self.fetched / shard.file
        if not place.is_file():
            with atomic_path(place) as partial:
                system.get_file(f"{root}/{shard.file}", str(partial))
                if (found := _sha256(partial)) != shard.sha256:
                    raise OSError(f"what came has the sha256 {found}, the index says {shard.sha256}")
        return place
