"""A run's stored targets: found before anything is trained, complete for the run's pictures, or refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from visper.common.errors import ConfigError, DataError
from visper.config import Run
from visper.data.checks.digests import digests_of
from visper.data.images import background_of
from visper.data.rows.records import Record
from visper.data.rows.table import Records
from visper.target_store.fingerprint import Fingerprint
from visper.target_store.store import TargetStore, find_targets


def build_command(run: Run, store: str | Path) -> str:
    """What computes a run's missing targets, as a person would type it."""
    written = Path(run.output) / "run.yaml"
    return f"`visper targets build {written if written.is_file() else 'RUN.yaml'} --out {store}`"


def makers(run: Run, image_processor: Any) -> dict[str, Fingerprint]:
    """What makes the run's targets, by task; the processor knows the color that ``pad`` pads with."""
    assert run.distillation is not None
    geometry, background = run.data.geometry.value, background_of(image_processor)
    return {task: Fingerprint.of(own.teacher, geometry, background) for task, own in run.distillation.tasks.items()}


def open_targets(run: Run, image_processor: Any, store: str | Path | None = None) -> TargetStore | None:
    """The store that the run names (``distillation.targets``), or ``store``; None: its teachers are to be asked.

    Raises:
        ConfigError: it is none, or has no targets of one of the run's teachers.
    """
    if run.distillation is None:
        return None
    place = store or run.distillation.targets
    if place is None:
        return None
    remedy = build_command(run, place)
    found = {}
    for task, fingerprint in makers(run, image_processor).items():
        targets = find_targets(Path(place), task, fingerprint, run.distillation.tasks[task].teacher.model, remedy)
        wanted, has = run.distillation.teacher_dtype, targets.teacher.precision
        if wanted not in (None, has):
            raise ConfigError(
                f"task '{task}': the targets in '{targets.folder}' were computed in {has}, distillation.teacher_dtype "
                f"says {wanted}: leave it out, or build a store of its own"
            )
        found[task] = targets
    return TargetStore(found, remedy)


def require_targets(store: TargetStore, records: Sequence[Record], quiet: bool = True) -> None:
    """Refuses, on every rank, rows whose pictures have no stored targets.

    The first process looks, at a hash of each file that is kept until the file changes. Pictures in shards are not
    looked at: a missing target drops its row when its turn comes, and ``data.drop_limit`` counts it.

    Raises:
        DataError: the message counts them, names the first, and the command that computes them.
    """
    fault = None
    if PartialState().is_main_process and isinstance(records, Records):
        fault = _fault(store, records, quiet)
    fault = broadcast_object_list([fault])[0]
    if fault is not None:
        raise DataError("no stored target", fault)


def _fault(store: TargetStore, records: Records, quiet: bool) -> str | None:
    files = records.image_files()
    rows = np.flatnonzero([file is not None for file in files])
    digests = digests_of(records.select(rows), quiet) if len(rows) else []
    lacking = store.lacking(own for own in digests if own is not None)
    if not lacking:
        return None
    task, lost = next(iter(lacking.items()))
    first = files[int(rows[digests.index(lost[0])])]
    counts = ", ".join(f"{len(own)} pictures of task '{name}'" for name, own in lacking.items())
    return (
        f"{counts} are not in '{store.tasks[task].folder.parent}', the first is '{first}': it is new or was changed "
        f"since; {store.remedy}"
    )
