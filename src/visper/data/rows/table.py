"""Conversation files as memory-mapped Arrow tables: parsed once, then opened in milliseconds by every process.

Row i of the table is row i of the file; bad rows are kept with their reason. All processes of a machine share the
memory pages; a process itself needs only an index of eight bytes per row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from visper.common.cache import FOLDER, cache_file, cache_folder, code_key, identity, key
from visper.common.console import printable, track
from visper.common.errors import DataError
from visper.data.rows import formats, json_rows
from visper.data.rows.formats import parse, unread_image
from visper.data.rows.json_rows import read_rows
from visper.data.rows.records import Drop, Record, ShownImage, Turn, own_id

ROLE_LETTERS = {"system": "s", "user": "u", "assistant": "a"}
_ROLE_OF = {letter: role for role, letter in ROLE_LETTERS.items()}
BATCH_ROWS = 1024
SCHEMA = pa.schema(
    [
        ("id", pa.string()),  # the row's own id, as text
        ("image", pa.string()),  # the first image, relative to the images folder; null: text only
        ("image_turn", pa.int32()),
        # All images of a row with several, else null, so that rows with one image stay small.
        ("images", pa.list_(pa.struct([("path", pa.string()), ("turn", pa.int32()), ("at", pa.int32())]))),
        ("image_tags", pa.int32()),  # number of tags and image parts in the user's turns of the file
        ("roles", pa.string()),  # one letter per turn
        ("texts", pa.list_(pa.string())),
        ("unread_image", pa.string()),  # in a row without images, a key that looks like one, see formats.unread_image
        ("reason", pa.string()),  # why the row is not a conversation; null for good rows
        ("detail", pa.string()),
    ]
)


class RecordTable:
    """The rows of one conversation file, memory-mapped. Picklable: another process maps the same file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with pa.memory_map(str(path)) as source:
            self._table = pa.ipc.open_file(source).read_all()
        self._columns = {name: self._table.column(name) for name in self._table.schema.names}
        self._has_several = self._columns["images"].null_count < len(self)

    def __reduce__(self) -> tuple[type[RecordTable], tuple[Path]]:
        return type(self), (self.path,)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def column(self, name: str) -> pa.ChunkedArray:
        """One column of ``SCHEMA`` for all rows of the file."""
        return self._columns[name]

    def value(self, name: str, row: int) -> Any:
        """One cell."""
        return self._columns[name][row].as_py()

    def record(self, row: int, name: str, images: Path | None) -> Record:
        """Row ``row`` as a record. ``images`` is the images folder; None: image paths are left as in the file."""
        roles = self.value("roles", row)
        turns = tuple(
            Turn(_ROLE_OF[role], text)  # type: ignore[arg-type]
            for role, text in zip(roles, self.value("texts", row), strict=True)
        )
        shown = self.images(row)
        if images is not None:
            shown = tuple(replace(image, path=str(images / image.path)) for image in shown)
        return Record(self.sample_id(row, name), turns, shown)

    def sample_id(self, row: int, name: str) -> str:
        """The row as logs and drop lists name it: source, number, and its own id or, without one, its first image.

        By the last part, a drop list of rows that have moved since is recognized.
        """
        return f"{name}/{row}/{self.value('id', row) or printable(self.value('image', row) or '')}"

    def images(self, row: int) -> tuple[ShownImage, ...]:
        """The images of a row, with paths as in the file."""
        several = self.value("images", row) if self._has_several else None
        if several is not None:
            return tuple(ShownImage(**image) for image in several)
        first = self.value("image", row)
        return () if first is None else (ShownImage(first, self.value("image_turn", row)),)

    def image_names(self) -> list[tuple[str, ...]]:
        """The image paths of every row, as in the file."""
        names: list[tuple[str, ...]] = [() if first is None else (first,) for first in self.column("image").to_pylist()]
        if self._has_several:
            for row in np.flatnonzero(self._flags(pc.is_valid(self.column("images")))).tolist():
                names[row] = tuple(image.path for image in self.images(row))
        return names

    def num_images(self) -> npt.NDArray[np.int32]:
        """Number of images of each row, ``[rows]``."""
        counts = self.has_image().astype(np.int32)
        if self._has_several:
            counts = np.maximum(counts, pc.list_value_length(self.column("images")).fill_null(0).to_numpy())
        return counts

    def good_rows(self) -> npt.NDArray[np.int64]:
        """The numbers of the good rows, ascending."""
        return np.flatnonzero(self._flags(pc.is_null(self.column("reason"))))

    def has_image(self) -> npt.NDArray[np.bool_]:
        """Whether each row has an image, ``[rows]``."""
        return self._flags(pc.is_valid(self.column("image")))

    def characters(self) -> npt.NDArray[np.int64]:
        """Number of characters in each row's conversation, ``[rows]``."""
        parts = []
        for chunk in self.column("texts").chunks:
            sizes = pc.utf8_length(chunk.flatten()).to_numpy(zero_copy_only=False)
            parents = pc.list_parent_indices(chunk).to_numpy()
            parts.append(np.bincount(parents, weights=sizes, minlength=len(chunk)))
        return np.concatenate([np.zeros(0), *parts]).astype(np.int64)

    def drops(self, name: str) -> Iterator[Drop]:
        """The bad rows. ``name`` is the name of the source."""
        for row in np.flatnonzero(self._flags(pc.is_valid(self.column("reason")))).tolist():
            yield Drop(self.sample_id(row, name), self.value("reason", row), self.value("detail", row))

    @staticmethod
    def _flags(values: pa.ChunkedArray) -> npt.NDArray[np.bool_]:
        return np.asarray(values.to_numpy(), dtype=np.bool_)


def open_table(file: Path, quiet: bool = True, columns: Mapping[str, str] | None = None) -> RecordTable:
    """The table of a JSON file, from the cache if the file has not changed; otherwise it is parsed and cached.

    Args:
        columns: field of ``formats.FIELDS`` -> its key in the rows, where that differs.

    Raises:
        DataError: the file is missing, is not a list of rows, or changes while it is read.
    """
    before = identity(file)
    columns = dict(columns or {})
    state = f"{file.name}-{table_key(before)}"
    mapped = f"-{key(json.dumps(columns, sort_keys=True))}" if columns else ""
    place = cache_folder(file.resolve().parent) / f"{state}{mapped}.arrow"
    if not place.is_file():
        absent = set(columns.values())

        def rows() -> Iterator[dict[str, Any]]:
            for row in track(read_rows(file), description=f"reading {file.name}", quiet=quiet):
                absent.difference_update(row if isinstance(row, dict) else ())
                yield cells(rename(row, columns))
            if absent:
                raise DataError("unknown columns", f"'columns' names {sorted(absent)}, but no row of '{file}' has them")
            _refuse_change(file, before)

        write_table(rows(), place)
        _forget(place.parent, file.name, state)
    return RecordTable(place)


def table_key(*parts: str | Mapping[str, str]) -> str:
    """A cache key of everything that a table's content depends on: ``parts``, and the code that reads rows."""
    return key(*(json.dumps(part, sort_keys=True) for part in parts), code_key(formats, json_rows), *map(str, SCHEMA))


def rename(row: Any, columns: Mapping[str, str]) -> Any:
    """The row with its keys renamed by ``columns`` (field -> key in the row), without its own keys of those fields."""
    if not columns or not isinstance(row, dict):
        return row
    others = {name: value for name, value in row.items() if name not in columns and name not in columns.values()}
    return others | {field: row[own] for field, own in columns.items() if own in row}


def write_table(rows: Iterable[dict[str, Any]], place: Path) -> None:
    """Writes rows of ``SCHEMA`` to ``place``, atomically; an error that ``rows`` raises discards them."""
    cells = iter(rows)
    with (
        cache_file(place) as partial,
        pa.OSFile(str(partial), "wb") as sink,
        pa.ipc.new_file(sink, SCHEMA) as writer,
    ):
        while batch := list(islice(cells, BATCH_ROWS)):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=SCHEMA))


def _refuse_change(file: Path, before: str) -> None:
    if identity(file) != before:
        raise DataError("changing file", f"'{file}' changed while it was read: wait until it is complete")


def _forget(folder: Path, name: str, state: str) -> None:
    """Removes cached tables of other states of the file. Processes that still have one mapped keep its content.

    Tables of the same state with other ``columns`` are kept: a run may read the file under several.
    """
    if folder.name != FOLDER:
        return  # a cache for several folders may contain another file of the same name
    for old in folder.iterdir():
        if re.fullmatch(re.escape(name) + r"-[0-9a-f]{16}[-.].*", old.name) and not old.name.startswith(state):
            old.unlink(missing_ok=True)


def cells(row: Any) -> dict[str, Any]:
    """A row as values of ``SCHEMA``; a bad row with its reason."""
    own = own_id(row)
    try:
        parsed = parse(row)
    except (DataError, RecursionError) as error:
        bad = error if isinstance(error, DataError) else DataError("bad turn", "nested too deeply")
        empty = {"id": own, "image_tags": 0, "roles": "", "texts": []}
        return {**empty, "reason": bad.reason, "detail": printable(bad.detail)}
    return {
        "id": own,
        **(_image_cells(parsed.images) if parsed.images else {"unread_image": unread_image(row)}),
        "image_tags": parsed.image_tags,
        "roles": "".join(ROLE_LETTERS[turn.role] for turn in parsed.turns),
        "texts": [turn.text for turn in parsed.turns],
    }


def _image_cells(images: Sequence[ShownImage]) -> dict[str, Any]:
    first = {"image": images[0].path, "image_turn": images[0].turn}
    return first if len(images) == 1 else {**first, "images": [asdict(image) for image in images]}


@dataclass(frozen=True)
class Part:
    """One source of a run. ``embedded``: row -> the bytes of its images; None if the images are files."""

    name: str
    table: RecordTable
    images: Path | None = None
    embedded: Any = None
    weight: float = 1.0


class Records(Sequence[Record]):
    """The good rows of a run's sources, each read on access.

    Args:
        parts: the sources, in order.
        rows: row numbers in the concatenated sources; default: all good rows.
    """

    def __init__(self, parts: Sequence[Part], rows: npt.NDArray[np.int64] | None = None) -> None:
        self.parts = tuple(parts)
        self.starts = np.cumsum([0, *(len(part.table) for part in self.parts)])
        if rows is None:
            good = [part.table.good_rows() + start for part, start in zip(self.parts, self.starts, strict=False)]
            rows = np.concatenate([np.zeros(0, dtype=np.int64), *good])
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Records: ...
    def __getitem__(self, index: int | slice) -> Record | Records:
        """The record ``index``, with full image paths; for a slice, the selected rows."""
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        part, row = self.place(index)
        return part.table.record(row, part.name, part.images)

    def place(self, index: int) -> tuple[Part, int]:
        """The source of a row, and the row's number there."""
        number = self.source(index)
        return self.parts[number], int(self.rows[index] - self.starts[number])

    def source(self, index: int) -> int:
        """The number of a row's source, counted from 0."""
        return int(np.searchsorted(self.starts, self.rows[index], side="right")) - 1

    @property
    def part_numbers(self) -> npt.NDArray[np.int64]:
        """``source`` of each row, ``[len(self)]``."""
        return np.searchsorted(self.starts, self.rows, side="right") - 1

    def select(self, kept: npt.NDArray[Any]) -> Records:
        """Some of these rows, given by indices or by a mask."""
        return Records(self.parts, self.rows[kept])

    def gather(self, values: Callable[[Part], npt.NDArray[Any]]) -> npt.NDArray[Any]:
        """The values of these rows, ``[len(self)]``; ``values(part)`` gives one value per row of the part's table."""
        return np.concatenate([values(part) for part in self.parts])[self.rows]

    def image_files(self) -> Iterator[tuple[int, int, Path, str]]:
        """All images that are files: index of the row, number in the row, images folder and path as in the row.

        Check with ``common.files.inside`` before opening one. Conversations are not read.
        """
        names = [own for part in self.parts for own in part.table.image_names()]
        for index, (row, part) in enumerate(zip(self.rows.tolist(), self.part_numbers.tolist(), strict=True)):
            folder = self.parts[part].images
            if folder is not None:
                yield from ((index, number, folder, name) for number, name in enumerate(names[row]))

    @property
    def num_images(self) -> npt.NDArray[np.int32]:
        """Number of images of each row, ``[len(self)]``."""
        return self.gather(lambda part: part.table.num_images())

    @property
    def has_image(self) -> npt.NDArray[np.bool_]:
        """Whether each row has an image, ``[len(self)]``."""
        return self.gather(lambda part: part.table.has_image())

    @property
    def characters(self) -> npt.NDArray[np.int64]:
        """Number of characters in each row's conversation, ``[len(self)]``."""
        return self.gather(lambda part: part.table.characters())
