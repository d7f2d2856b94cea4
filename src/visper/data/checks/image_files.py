"""Checks every image file of a data set on all cores: can it be decoded, and does its format match its name?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from visper.common.cache import code_key, key
from visper.common.errors import DataError
from visper.common.parallel import in_order
from visper.config.data import MAX_PIXELS
from visper.data import decoding
from visper.data.checks.digests import contents_of
from visper.data.checks.kept import of_files
from visper.data.decoding import opened
from visper.data.normalize import mislabeled
from visper.data.rows.table import Records


@dataclass(frozen=True)
class Verdict:
    """The result of checking a file: the format of its content, or why it is not an image."""

    format: str | None = None
    reason: str | None = None
    detail: str = ""

    def mislabeled(self, path: str) -> bool:
        """Whether the content is a valid image of another format than the name's."""
        return self.format is not None and mislabeled(self.format, path)


def look(path: str, max_pixels: int = MAX_PIXELS, content: bytes | None = None) -> Verdict:
    """Decodes a complete file. A JPEG's compressed data is read to its end, but decoded at an eighth of the size.

    Args:
        content: the bytes of an embedded image, whose name is ``path``.
    """
    try:
        with opened(path, content, max_pixels) as image:
            image.seek(0)
            found = image.format
            image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))
            image.load()
    except DataError as error:
        return Verdict(None, error.reason, error.detail)
    return Verdict(found)


def look_at_all(
    folder: Path,
    names: Sequence[str],
    kept: Path,
    quiet: bool,
    workers: int | None,
    max_pixels: int,
) -> dict[str, Verdict]:
    """The verdict on every file by its path; earlier ones are read from ``kept``. Files outside the folder stay closed.

    Args:
        folder: the images folder.
        names: files in it, each once.
        kept: file of verdicts, see ``kept.of_files``.
    """
    new = partial(_verdicts, max_pixels=max_pixels, quiet=quiet, workers=workers)
    found, outside = of_files([(folder, name) for name in names], kept, new)
    faults = {path: Verdict(None, error.reason, error.detail) for path, error in outside.items()}
    return {path: Verdict(*values) for path, values in found.items()} | faults


def look_at_embedded(records: Records, quiet: bool, workers: int | None, max_pixels: int) -> Iterator[list[Verdict]]:
    """The verdicts on the embedded images of each row, in order; one for a row whose images are not all embedded."""
    look_at = partial(_look_at_row, records, max_pixels)
    return in_order(look_at, range(len(records)), "looking at embedded images", quiet, workers)


def _look_at_row(records: Records, max_pixels: int, index: int) -> list[Verdict]:
    part, row = records.place(index)
    try:
        contents = contents_of(records, index)
    except DataError as error:
        return [Verdict(None, error.reason, error.detail)]
    named = zip(part.table.images(row), contents, strict=True)
    return [look(image.path, max_pixels, content) for image, content in named]


def _verdicts(paths: list[str], max_pixels: int, quiet: bool, workers: int | None) -> Iterator[list[str | None]]:
    for verdict in in_order(partial(look, max_pixels=max_pixels), paths, "looking at images", quiet, workers):
        yield [verdict.format, verdict.reason, verdict.detail]


def verdicts_file(folder: Path, root: Path, max_pixels: int) -> Path:
    """The file for verdicts on the images under ``root``; it differs by version of the decoding code and by limit."""
    return folder / f"images-{key(str(root.resolve()), max_pixels, code_key(decoding))}.jsonl"
