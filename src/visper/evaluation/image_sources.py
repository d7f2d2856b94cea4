"""Sources of the images of questions: files in a folder, or bytes in Parquet files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from visper.common.cache import key
from visper.common.errors import DataError
from visper.common.files import inside
from visper.data.images import open_image


class ImageSource(Protocol):
    """Opens images by the names in the questions."""

    def open(self, name: str) -> Image.Image:
        """The image in RGB. Raises DataError if it cannot be read."""

    def absent(self, names: Iterable[str]) -> list[str]:
        """The names without an image."""

    def digest(self, name: str) -> str:
        """A digest of the image's present content; empty if it cannot be read."""


class ImageFolder:
    """Images by their paths under a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._digests: dict[tuple[str, int, int, int], str] = {}

    def open(self, name: str) -> Image.Image:
        """The image in RGB. Raises DataError if it cannot be read."""
        return open_image(inside(self.folder, name))

    def absent(self, names: Iterable[str]) -> list[str]:
        """The names without a file in the folder. Raises DataError for names that lead outside it."""
        return [name for name in names if not inside(self.folder, name).is_file()]

    def digest(self, name: str) -> str:
        """A digest of the file's present content, whatever its name and folder; empty if it cannot be read."""
        file = inside(self.folder, name)
        try:
            found = file.stat()
            state = (name, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
            if state not in self._digests:
                self._digests[state] = key(file.read_bytes())
        except OSError:
            return ""
        return self._digests[state]


class TableImages:
    """Images embedded in a table, named by a digest of their bytes, so that an image in several rows has one name.

    Attributes:
        names: names of each row's images, in order.
    """

    def __init__(self, table: Any, column: str) -> None:
        from visper.data.rows.hugging_face import EmbeddedImages

        self._content = EmbeddedImages(table.select_columns([column]).with_format("arrow"))
        self.names: list[tuple[str, ...]] = []
        self._places: dict[str, tuple[int, int]] = {}
        for row in range(len(table)):
            names = tuple(key(content) for content in self._content(row))
            self.names.append(names)
            for number, name in enumerate(names):
                self._places.setdefault(name, (row, number))

    def open(self, name: str) -> Image.Image:
        """The image in RGB. Raises DataError if it cannot be read."""
        row, number = self._places[name]
        return open_image(f"image {number + 1} of row {row}", self._content(row)[number])

    def absent(self, names: Iterable[str]) -> list[str]:
        """The names that are not in the table."""
        return [name for name in names if name not in self._places]

    def digest(self, name: str) -> str:
        """The name, which is a digest."""
        return name


def read_table(files: Sequence[Path], needed: Sequence[str], optional: Sequence[str], what: str) -> Any:
    """Reads columns of Parquet files as one table of `datasets`.

    Args:
        what: name of the data, at the beginning of error messages.

    Raises:
        DataError: a file cannot be read, or lacks a needed column.
    """
    from visper.data.rows.hugging_face import load_parquet

    columns: list[str] = [*needed, *optional]
    for file in files:
        try:
            found = pq.read_schema(file).names
        except (OSError, pa.ArrowException) as error:
            raise DataError("unreadable file", f"{what}: '{file}': {error}; is it a complete Parquet file?") from error
        lacking = [name for name in needed if name not in found]
        if lacking:
            raise DataError(
                "missing column",
                f"{what}: '{file}' has no column {', '.join(map(repr, lacking))}; it has {', '.join(found)}",
            )
        columns = [name for name in columns if name in found]
    return load_parquet([str(file) for file in files], what, columns=columns)
