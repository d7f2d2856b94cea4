"""Opens a run's sources of any kind as one sequence of records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from visper.common.errors import DataError
from visper.config import Source
from visper.data.rows.parts import json_source, open_parts
from visper.data.rows.records import DropList
from visper.data.rows.table import Records
from visper.data.sampler import Mixture


def open_records(
    sources: Sequence[Source | tuple[str | Path, str | Path]], drops: DropList, quiet: bool = True
) -> Records:
    """The good rows of all sources, in order; each is read on access.

    Args:
        sources: sources other than sets, or pairs of a JSON file and its images folder.
        drops: bad rows are added to it; rows that it has ``agreed`` on are left out without being added.
        quiet: no progress bar when a source is read for the first time.

    Raises:
        DataError: a source cannot be read, or an agreed drop names a row that does not exist.
    """
    given = [one if isinstance(one, Source) else json_source(*one) for one in sources]
    parts = open_parts(given, quiet)
    records = Records(parts)
    agreed = _agreed_rows(records, drops)
    for part in parts:
        drops.extend(drop for drop in part.table.drops(part.name) if drop.sample_id not in drops.agreed)
    return records.select(~np.isin(records.rows, agreed)) if len(agreed) else records


def mixture_of(records: Records) -> Mixture | None:
    """How often each source's rows occur in an epoch; None if every row occurs once."""
    if all(part.weight == 1 for part in records.parts):
        return None
    return Mixture(torch.from_numpy(records.part_numbers), tuple(part.weight for part in records.parts))


def _agreed_rows(records: Records, drops: DropList) -> npt.NDArray[np.int64]:
    by_name = {part.name: (part.table, int(start)) for part, start in zip(records.parts, records.starts, strict=False)}
    found, strange = [], []
    for sample_id in drops.agreed:
        name, row = [*sample_id.split("/", 2), ""][:2]
        table, start = by_name.get(name, (None, 0))
        known = table is not None and row.isdecimal() and int(row) < len(table)
        if table is None or not known or table.sample_id(int(row), name) != sample_id:
            strange.append(sample_id)
        else:
            found.append(start + int(row))
    if strange:
        raise DataError(
            "drop list of other data",
            f"{len(strange)} of its {len(drops.agreed)} rows are not in the run's sources; the first is "
            f"'{strange[0]}': check the sources again (`visper data check --run RECIPE --drop LIST`)",
        )
    return np.asarray(found, dtype=np.int64)
