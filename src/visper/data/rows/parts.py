"""Opens sources of any kind as tables with their images. Does not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from visper.config import Source
from visper.data.rows.hugging_face import open_hub, open_parquet
from visper.data.rows.records import source_names
from visper.data.rows.table import Part, open_table


def open_parts(sources: Sequence[Source], quiet: bool = True) -> list[Part]:
    """The sources of a run, in order, under the names by which its drop lists call them.

    Args:
        sources: sources other than sets.
        quiet: no progress bar when a source is read for the first time.

    Raises:
        DataError: a source cannot be read.
    """
    names = source_names([Path(source.place) for source in sources])
    return [
        replace(_open(source, name, quiet), weight=source.weight) for name, source in zip(names, sources, strict=True)
    ]


def json_source(file: str | Path, images: str | Path, like: Sequence[Source] = ()) -> Source:
    """A JSON file and its images folder, which may be any paths.

    Args:
        like: the sources of a run; if the file is one of them, it is read with that one's ``columns``.
    """
    same = (one.columns for one in like if one.json_file and Path(one.json_file).resolve() == Path(file).resolve())
    return Source.model_construct(json_file=str(file), images=str(images), columns=next(same, {}))


def _open(source: Source, name: str, quiet: bool) -> Part:
    if source.kind == "json":
        assert source.images is not None
        return Part(
            name,
            open_table(Path(source.place), quiet, {str(field): own for field, own in source.columns.items()}),
            Path(source.images),
        )
    return (open_hub if source.kind == "hf" else open_parquet)(source, name, quiet)
