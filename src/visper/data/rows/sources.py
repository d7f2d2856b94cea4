"""A run's sources, whatever their kind, as one sequence of records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from visper.common.errors import DataError
from visper.data.rows.hugging_face import open_hub, open_parquet
from visper.data.rows.records import DropList, Record, RowSource, source_names
from visper.data.rows.shards import ShardPictures, open_shards
from visper.data.rows.table import Part, Records, open_table
from visper.data.sampler import Mixture

BLOCK_ROWS = 1000  # of a source without shards, where another one has them


def open_records(
    sources: Sequence[RowSource | tuple[str | Path, str | Path | None]], drops: DropList, quiet: bool = True
) -> Records:
    """The good rows of every source, in order; each is read when it is asked for.

    Args:
        sources: or, for short, pairs of a JSON file and the folder of its images, or of shards and None.
        drops: takes the bad rows; those it has ``agreed`` on are left out silently.
        quiet: no progress bar where a source is read for the first time.

    Raises:
        DataError: a source cannot be read, or an agreed drop names a row that is not there.
    """
    given = [source if isinstance(source, RowSource) else _short(*source) for source in sources]
    names = source_names([Path(source.place) for source in given])
    parts = [
        replace(_open(source, name, quiet), weight=source.weight) for name, source in zip(names, given, strict=True)
    ]
    records = Records(parts)
    agreed = _agreed_rows(records, drops)
    for part in parts:
        drops.extend(drop for drop in part.table.drops(part.name) if drop.sample_id not in drops.agreed)
    return records.select(~np.isin(records.rows, agreed)) if len(agreed) else records


def _short(place: str | Path, images: str | Path | None) -> RowSource:
    return RowSource(str(place), kind="shards") if images is None else RowSource(str(place), str(images))


def _open(source: RowSource, name: str, quiet: bool) -> Part:
    if source.kind == "json":
        assert source.images is not None
        return Part(name, open_table(Path(source.place), quiet, source.columns), Path(source.images))
    if source.kind == "shards":
        return open_shards(source.place, name)
    return (open_hub if source.kind == "hf" else open_parquet)(source, name, quiet)


def blocks_of(records: Sequence[Record]) -> npt.NDArray[np.int64] | None:
    """Which rows are to be read together, ``[len(records)]``: those of a shard. None where no source has shards."""
    if not isinstance(records, Records) or not any(map(_in_shards, records.parts)):
        return None
    whole, first = [], 0
    for part in records.parts:
        if _in_shards(part):
            own = part.pictures.blocks()
        else:
            own = np.random.default_rng(0).permutation(len(part.table)) // BLOCK_ROWS
        whole.append(own + first)
        first += int(own.max(initial=-1)) + 1
    return np.concatenate(whole)[records.rows]


def mixture_of(records: Sequence[Record]) -> Mixture | None:
    """How often each source's rows are seen in an epoch; None where every row is seen once."""
    if not isinstance(records, Records) or all(part.weight == 1 for part in records.parts):
        return None
    return Mixture(torch.from_numpy(records.part_numbers), tuple(part.weight for part in records.parts))


def _in_shards(part: Part) -> bool:
    return isinstance(part.pictures, ShardPictures)


def _agreed_rows(records: Records, drops: DropList) -> npt.NDArray[np.int64]:
    by_name = {part.name: (part.table, int(start)) for part, start in zip(records.parts, records.starts, strict=False)}
    found, strange = [], []
    for sample_id in drops.agreed:
        name, row, own = [*sample_id.split("/", 2), "", ""][:3]
        table, start = by_name.get(name, (None, 0))
        known = table is not None and row.isdecimal() and int(row) < len(table)
        if table is None or not known or table.value("id", int(row)) != own:
            strange.append(sample_id)
        else:
            found.append(start + int(row))
    if strange:
        raise DataError(
            "drop list of other data",
            f"{len(strange)} of its {len(drops.agreed)} rows are not in the run's sources, the first is "
            f"'{strange[0]}': check the sources again (`visper data check FILE --images DIR --drop LIST`)",
        )
    return np.asarray(found, dtype=np.int64)
