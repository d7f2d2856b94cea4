"""The place in the data that a checkpoint stands at: a step, in an order that must be the same when it is continued.

The order is a function of the rows, the seed and the grouping. These are written into the checkpoint and compared on
resuming.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from visper.common.cache import key
from visper.common.errors import ConfigError
from visper.data.rows.records import DropList
from visper.data.rows.table import Records
from visper.training.stage_data import StageData

ORDER = "order.json"


def order_of(data: StageData) -> dict[str, Any]:
    """What the order of the rows follows from, apart from the run's own settings."""
    sampler, records = data.sampler, data.dataset.records
    if isinstance(records, Records):
        ids = ["\0".join(part.table.column("id").to_pylist()) for part in records.parts]
        rows = key(*ids, records.rows.tobytes())
    else:
        rows = key(*(record.id for record in records))
    grouping = [] if sampler.lengths is None else [_bytes(sampler.lengths), _bytes(sampler.has_image)]
    grouping += [] if sampler.groups is None else [_bytes(sampler.groups)]
    found = {"rows": len(records), "rows_key": rows, "grouping": key(sampler.seed, *grouping)}
    if sampler.mixture is not None:
        found["mixture"] = key(_bytes(sampler.mixture.sources), *map(str, sampler.mixture.weights))
    return found


def write_order(folder: Path, data: StageData) -> None:
    """Writes the order into a checkpoint that is being written."""
    (folder / ORDER).write_text(json.dumps(order_of(data), indent=1), encoding="utf-8")


def require_same_order(checkpoint: Path, data: StageData) -> None:
    """Refuses to continue at a step of another order: rows would be read twice and others never.

    Raises:
        ConfigError: the data differ from the checkpoint's.
    """
    theirs, ours = json.loads((checkpoint / ORDER).read_text(encoding="utf-8")), order_of(data)
    if theirs == ours:
        return
    what = f"{theirs['rows']} rows then, {ours['rows']} now" if theirs["rows"] != ours["rows"] else "other rows"
    raise ConfigError(
        f"checkpoint '{checkpoint}' stands at a step of other data ({what}; left out now: {_left_out(data.drops)}): "
        "put the data back as it was (`visper data check` says what is missing), or train anew into another output"
    )


def _left_out(drops: DropList) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in drops.counts().items()) or "none"


def _bytes(values: torch.Tensor) -> bytes:
    return values.numpy().tobytes()
