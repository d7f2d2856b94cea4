"""Checks that a resumed run reads its rows in the same order as the run that wrote the checkpoint.

The order is a function of rows, seed, grouping and mixture. Digests of these are saved in the checkpoint and compared
on resume.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from visper.common.cache import key
from visper.common.errors import ConfigError
from visper.data.rows.records import DropList
from visper.training.output import DROPPED
from visper.training.stage_data import StageData

ORDER = "order.json"


def order_of(data: StageData) -> dict[str, Any]:
    """Digests of everything that determines the order of the rows, apart from the run's own settings."""
    sampler, records = data.sampler, data.dataset.records
    ids = ["\0".join(part.table.column("id").to_pylist()) for part in records.parts]
    rows = key(*ids, records.rows.tobytes())
    grouping = [] if sampler.lengths is None else [_bytes(sampler.lengths), _bytes(sampler.has_image)]
    grouping += [] if sampler.groups is None else [_bytes(sampler.groups)]
    found = {"rows": len(records), "rows_key": rows, "grouping": key(sampler.seed, *grouping)}
    if sampler.mixture is not None:
        found["mixture"] = key(_bytes(sampler.mixture.sources), *map(str, sampler.mixture.weights))
    return found


def write_order(folder: Path, data: StageData) -> None:
    """Writes ``order.json`` into a checkpoint that is being written."""
    (folder / ORDER).write_text(json.dumps(order_of(data), indent=1), encoding="utf-8")


def continue_rows(checkpoint: Path, data: StageData) -> None:
    """Drops from ``data`` the rows that were found bad before the checkpoint; later ones may be good by now.

    Raises:
        ConfigError: the checkpoint was written with other rows or in another order.
    """
    require_same_order(checkpoint, data)
    before = DropList.read(checkpoint / DROPPED)
    data.drops.extend(drop for drop in before if drop.sample_id not in data.drops.agreed)


def require_same_order(checkpoint: Path, data: StageData) -> None:
    """Checks that the data has the checkpoint's order; otherwise some rows would be read twice and others never.

    Raises:
        ConfigError: the data differs from the checkpoint's.
    """
    then, now = json.loads((checkpoint / ORDER).read_text(encoding="utf-8")), order_of(data)
    if then == now:
        return
    what = f"{then['rows']} rows then, {now['rows']} now" if then["rows"] != now["rows"] else "other rows"
    raise ConfigError(
        f"checkpoint '{checkpoint}' was written with other data ({what}; rows dropped now: {_dropped(data.drops)}): "
        "restore the data (`visper data check` says what is missing), or train from step 0 into another output"
    )


def _dropped(drops: DropList) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in drops.counts().items()) or "none"


def _bytes(values: torch.Tensor) -> bytes:
    return values.numpy().tobytes()
