"""Rows read with the `datasets` library: data sets on the hub or in a folder, and Parquet files.

`datasets` downloads, converts and memory-maps them. Their texts are copied once into a table like a JSON file's (see
``table``); embedded images stay in the Arrow files of `datasets`.
"""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from visper.common.cache import cache_folder, code_key, identity, key, sample
from visper.common.console import track
from visper.common.errors import DataError
from visper.common.files import place_of
from visper.config import Source
from visper.data.rows.formats import FIELDS, IMAGE_SUFFIXES, MEDIA_KEYS, OBJECTS, Embedded, NotEmbedded
from visper.data.rows.json_rows import CONVERSATIONS
from visper.data.rows.table import Part, RecordTable, cells, table_key, write_table

_IMAGE_FIELDS = ("image", "images")
_AT_ONCE = 1000
_LONGEST_REASON = 1000  # characters


def open_hub(source: Source, name: str, quiet: bool) -> Part:
    """Opens a data set on the hub, a folder of data files, or a folder written by ``Dataset.save_to_disk``.

    Args:
        name: the source's name in the ids of its rows.

    Raises:
        DataError: it cannot be loaded, or its columns do not fit a format; the message says how to map them.
    """
    import datasets

    split, folder = source.split or "train", Path(source.place)
    saved = folder / split if (folder / "dataset_dict.json").is_file() else folder
    revision, remedy = None, ""
    if not folder.exists():
        revision, download = source.revision, f"`hf download --repo-type dataset {source.place} --local-dir FOLDER`"
        remedy = f". Without a network, download it on another machine ({download}) and give {{hf: FOLDER}}"
    with _loading(f"data set '{source.place}', split '{split}'", remedy, quiet):
        if (saved / "state.json").is_file():
            found = datasets.load_from_disk(str(saved))
        else:
            cache = _cache_of(_tables_below(folder)) if folder.exists() else None
            found = datasets.load_dataset(source.place, source.subset, split=split, revision=revision, cache_dir=cache)
    return _as_part(found, source, name, quiet)


def open_parquet(source: Source, name: str, quiet: bool) -> Part:
    """Opens Parquet files given by a path or pattern, in the order of their names; see ``open_hub``."""
    given = Path(source.place)
    files = [source.place] if given.is_file() else sorted(glob.glob(source.place, recursive=True))  # noqa: PTH207 (the pattern may be absolute)
    if not files or given.is_dir():
        expected = f"Parquet files, such as '{given / '*.parquet'}'" if given.is_dir() else "Parquet files"
        raise DataError("no such file", f"{place_of(source.place)}: expected {expected}; check 'data.sources'")
    return _as_part(load_parquet(files, f"'{source.place}'", quiet), source, name, quiet)


def load_parquet(files: list[str], what: str, quiet: bool = True, columns: list[str] | None = None) -> Any:
    """Parquet files as one memory-mapped ``datasets.Dataset`` with all columns, or the given ones.

    Raises:
        DataError: they cannot be loaded; the message begins with ``what``.
    """
    import datasets

    with _loading(what, "; are all of them Parquet files of one schema?", quiet):
        cache, escaped = _cache_of(map(Path, files)), list(map(glob.escape, files))
        return datasets.load_dataset("parquet", data_files=escaped, split="train", columns=columns, cache_dir=cache)


def _cache_of(files: Iterable[Path]) -> str:
    """The folder for the Arrow copy of files of this content; `datasets` itself compares only their paths and dates."""
    import datasets

    return str(Path(datasets.config.HF_DATASETS_CACHE) / key(*map(sample, files)))


def _tables_below(folder: Path) -> Iterator[Path]:
    """The files of a data set that may hold rows."""
    for file in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if not hidden and file.suffix.lower() not in IMAGE_SUFFIXES and file.is_file():
            yield file


@contextmanager
def _loading(what: str, remedy: str, quiet: bool) -> Iterator[None]:
    """Turns errors of `datasets` into ``DataError``, and shows its progress bars only on a terminal."""
    import datasets

    before = datasets.are_progress_bars_disabled()
    if quiet or not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield
    except (OSError, ValueError, datasets.exceptions.DatasetsError, pa.ArrowException) as error:
        says_nothing = isinstance(error, datasets.exceptions.DatasetGenerationError)
        why = " ".join(str(error.__cause__ if says_nothing else error).split())
        raise DataError("cannot be loaded", f"{what}: {why[:_LONGEST_REASON]}{remedy}") from error
    finally:
        if not before:
            datasets.enable_progress_bars()


def _as_part(found: Any, source: Source, name: str, quiet: bool) -> Part:
    used = _columns_of(found, source)
    unread = _unread_columns(found, used)
    found = found.select_columns([*used.values(), *unread]).with_format("arrow")
    shown = [used[field] for field in _IMAGE_FIELDS if field in used]
    folder = source.images
    paths = [own for own in shown if folder is None and _holds_text(found.features.arrow_schema.field(own).type)]
    if paths:
        why = f"its column '{paths[0]}' contains texts: give 'images', the folder of these paths, or embed the images"
        raise DataError("no images folder", f"'{source.place}': {why}")
    files = [Path(file["filename"]) for file in found.cache_files]
    code = code_key(sys.modules[__name__])  # it names embedded images
    key = table_key(
        used, f"{source.split} {len(found)} {folder and _bases(folder)} {unread}", code, *map(identity, files)
    )
    table = cache_folder(files[0].parent if files else Path()) / f"{name.replace('/', '-')}-{key}.arrow"
    if not table.is_file():
        rows = track(_rows(found, used, unread, folder), description=f"reading {name}", total=len(found), quiet=quiet)
        write_table(map(cells, rows), table)
    images = EmbeddedImages(found.select_columns(shown)) if shown and folder is None else None
    return Part(name, RecordTable(table), None if folder is None else Path(folder), images)


def _columns_of(found: Any, source: Source) -> dict[str, str]:
    """Field -> column for the columns that are read.

    Raises:
        DataError: ``columns`` names a missing column, or the columns do not fit a format.
    """
    columns = source.columns
    absent = [own for own in columns.values() if own not in found.column_names]
    own_names = {field: field for field in (*FIELDS, *MEDIA_KEYS, OBJECTS) if field in found.column_names}
    used = {field: own for field, own in own_names.items() if own not in columns.values()} | dict(columns)
    captions = "text" in used and any(field in used for field in _IMAGE_FIELDS)
    if absent or not (captions or used.keys() & CONVERSATIONS):
        lacking = f"'columns' names {absent}, but" if absent else "its columns do not fit a format of rows:"
        raise DataError(
            "unknown columns",
            f"'{source.place}': {lacking} it has {list(found.column_names)}; expected 'conversations', 'messages' or "
            "'texts', or 'image' and 'text'. Map them, for example with columns: {messages: YOUR_COLUMN, image: "
            "YOUR_COLUMN}",
        )
    return used


def _unread_columns(found: Any, used: Mapping[str, str]) -> list[str]:
    """Columns of a data set without images that nothing reads and whose type could hold images or their paths."""
    if any(field in used for field in _IMAGE_FIELDS):
        return []
    kinds = {field.name: field.type for field in found.features.arrow_schema}
    others = [own for own in found.column_names if own not in (*used.values(), *FIELDS)]
    return [own for own in others if _holds_text(kinds[own]) or holds_images(kinds[own])]


def _rows(found: Any, used: Mapping[str, str], unread: list[str], folder: str | None) -> Iterator[dict[str, Any]]:
    start, sizes = 0, dict[str, int]()
    for batch in found.iter(_AT_ONCE):
        own_names = [f"embedded-{row}" for row in range(start, start + batch.num_rows)]
        values = [
            _image_names(batch.column(own).combine_chunks(), folder, own_names, sizes)
            if field in (*_IMAGE_FIELDS, *MEDIA_KEYS)
            else batch.column(own).to_pylist()
            for field, own in used.items()
        ]
        values += [_unread_values(batch.column(own).combine_chunks(), own_names) for own in unread]
        start += batch.num_rows
        yield from (dict(zip([*used, *unread], row, strict=True)) for row in zip(*values, strict=True))


def _unread_values(column: Any, own_names: Sequence[str]) -> list[Any]:
    """Texts as they are, embedded images as the kind of value that a JSON row would have, without their bytes."""
    if _holds_text(column.type):
        return list(column.to_pylist())
    return [{"bytes": ""} if named else None for named in _image_names(column, None, own_names, {})]


def _image_names(column: Any, folder: str | None, own_names: Sequence[str], sizes: dict[str, int]) -> list[Any]:
    """The names of images, without copying their bytes. Images of different names are taken for different images.

    Args:
        folder: the images folder; None: the images are embedded.
        own_names: the name of each row, for images without a path; in a list, its place is added.
        sizes: path -> number of bytes of its first image; extended here. Other images may have the same path, because
            `datasets` cuts off the folder when it uploads files: another size is added to the name.
    """
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks)
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        counts = pc.list_value_length(column).to_pylist()
        inner = [f"{name}-{at}" for name, n in zip(own_names, counts, strict=True) for at in range(n or 0)]
        flat = iter(_image_names(pc.list_flatten(column), folder, inner, sizes))
        return [None if n is None else [next(flat) for _ in range(n)] for n in counts]
    if _is_binary(column.type):
        there = pc.is_valid(column).to_pylist()
        return [Embedded(name) if valid else None for valid, name in zip(there, own_names, strict=True)]
    if not _is_image(column.type):
        return list(column.to_pylist())
    paths = pc.struct_field(column, "path").to_pylist()
    if folder is not None:
        return [path and _below(folder, path) for path in paths]
    lengths = pc.binary_length(pc.struct_field(column, "bytes")).to_pylist()
    there = pc.is_valid(column).to_pylist()
    return [
        None if not row or (length is None and path is None) else _name_of(path, length, name, sizes)
        for row, length, path, name in zip(there, lengths, paths, own_names, strict=True)
    ]


def _below(folder: str, path: str) -> str:
    """A path relative to the images folder: `datasets` makes those of an image folder's files absolute."""
    return next((path.removeprefix(base) for base in _bases(folder) if path.startswith(base)), path)


def _bases(folder: str) -> tuple[str, str]:
    return os.path.join(os.path.abspath(folder), ""), os.path.join(os.path.realpath(folder), "")  # noqa: PTH100, PTH118


def _name_of(path: str | None, length: int | None, own_name: str, sizes: dict[str, int]) -> str:
    if length is None:
        return NotEmbedded(path or own_name)
    if not path:
        return Embedded(own_name)
    if sizes.setdefault(path, length) == length:
        return Embedded(path)
    stem, suffix = os.path.splitext(path)  # noqa: PTH122 (any text may be a path here, which Path would change)
    return Embedded(f"{stem} ({length} bytes){suffix}")


def _holds_text(kind: Any) -> bool:
    inner = _item(kind)
    return bool(pa.types.is_string(inner) or pa.types.is_large_string(inner))


def holds_images(kind: Any) -> bool:
    """Whether a column of this Arrow type could contain images, alone or in lists."""
    return _is_image(_item(kind)) or _is_binary(_item(kind))


def _item(kind: Any) -> Any:
    return kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind


def _is_binary(kind: Any) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_image(kind: Any) -> bool:
    return bool(pa.types.is_struct(kind) and {"bytes", "path"} <= {field.name for field in kind})


class EmbeddedImages:
    """Row -> the bytes of its images. Picklable: another process maps the same files.

    Args:
        columns: a data set of the image columns, in Arrow format.
    """

    def __init__(self, columns: Any) -> None:
        self.columns = columns

    def __call__(self, row: int) -> list[bytes]:
        """The bytes of the row's images, in order.

        Raises:
            DataError: one is given without its bytes.
        """
        values = [column[0].as_py() for column in self.columns[row].columns]
        listed = [image for value in values for image in (value if isinstance(value, list) else [value])]
        images = [image for image in listed if image not in (None, {"bytes": None, "path": None})]
        contents: list[bytes] = []
        for image in images:
            content = image.get("bytes") if isinstance(image, dict) else image
            if not isinstance(content, bytes):
                raise DataError(
                    "image not embedded", f"row {row} has {str(image)[:200]}: expected the bytes of an image"
                )
            contents.append(content)
        return contents

    def rows_with_sizes(self, sizes: set[int]) -> list[int]:
        """The rows with an image whose number of bytes is in ``sizes``; no image is read, only the offsets."""
        wanted, found, start = pa.array(sorted(sizes), pa.int64()), set(), 0
        for batch in self.columns.iter(_AT_ONCE):
            for column in batch.columns:
                at = start
                for chunk in column.chunks:
                    rows = np.arange(at, at + len(chunk))
                    at += len(chunk)
                    if pa.types.is_list(chunk.type) or pa.types.is_large_list(chunk.type):
                        rows, chunk = rows[pc.list_parent_indices(chunk).to_numpy()], chunk.flatten()
                    contents = chunk if _is_binary(chunk.type) else pc.struct_field(chunk, "bytes")
                    lengths = pc.binary_length(contents).cast(pa.int64())
                    found.update(rows[pc.is_in(lengths, wanted).to_numpy(zero_copy_only=False)].tolist())
            start += batch.num_rows
        return sorted(found)
