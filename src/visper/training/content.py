"""Digests of a run's rows, images, own code and initial weights, so that a resume with changed content is refused, and
a finished run is not taken for the result of content that has changed since.

``content.json`` in the output folder holds digests of

- the rows of each source, as they were read: ids, roles, texts, image names and places (see ``table_digest``);
- the images of ``SAMPLED`` evenly spaced rows, since reading all images of a large set takes minutes. This detects that
  all images were replaced, but rarely that a single one was;
- the drop lists;
- the dtype of stored targets, and the precision of their teachers: they may have been built again in another;
- the modules of teachers, heads and losses of the user's own, without what they import;
- each local folder or file that weights are loaded from. The first process reads it at every start, at the speed of the
  disk; loading then reads it from the page cache.

Hub models are pinned to commits in ``run.yaml``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import xxhash

from visper.common.errors import ConfigError, DataError
from visper.common.importing import source_of
from visper.common.manifest import content_digest
from visper.config import Run
from visper.data.checks.digests import contents_of
from visper.data.rows.records import DropList
from visper.data.rows.sources import open_records
from visper.data.rows.table import Records
from visper.data.rows.table_digest import rows_digest
from visper.data.sets.catalog import row_files
from visper.model.student import student_place
from visper.target_store.open import TargetStore
from visper.target_store.store import STORE

CONTENT = "content.json"
SAMPLED = 256
_THREADS = 16


def content_of(run: Run, records: Records, targets: TargetStore | None) -> dict[str, str]:
    """The digests of all local content of the run, by the description that error messages use."""
    stored = targets.tasks if targets is not None else {}
    precisions = {f"the precision of the targets of '{task}'": own.teacher.precision for task, own in stored.items()}
    return rows_content(records) | _parts_content(run) | precisions


def _parts_content(run: Run) -> dict[str, str]:
    places = [(f"{what} '{Path(name)}'", Path(name)) for what, name in _parts(run)]
    places += [(f"the code of '{kind}'", file) for kind in _own_kinds(run) if (file := source_of(kind)) is not None]
    return {what: content_digest(place) for what, place in places if place.exists()}


def rows_content(records: Records, images_lost: bool = True) -> dict[str, str]:
    """The digests of the rows' sources and of a sample of their images, by description.

    Args:
        images_lost: False: leave out the images if one of the sample is missing.
    """
    found = {f"the rows of '{part.name}'": rows_digest(part.table) for part in records.parts}
    images = _sampled_images(records)
    return found if None in images and not images_lost else {**found, "images": _digest_of_images(images)}


def require_same_content(output: Path, content: dict[str, str]) -> None:
    """Checks that ``content`` equals the digests that the run in ``output`` started with.

    Raises:
        ConfigError: something has changed; the message names it.
    """
    before = _recorded(output)
    changed = sorted(what for what in before.keys() | content.keys() if before.get(what) != content.get(what))
    if changed:
        raise ConfigError(
            f"changed since the run in '{output}' began: {', '.join(changed)}. Restore it, or continue with the "
            "current content: `visper train RUN.yaml --resume --accept-changes`"
        )


def require_finished_with(run: Run) -> None:
    """Checks that a finished run was trained on the content that is there now.

    What has been removed since is not compared: a finished stage does not need its rows, or the stage before it.

    Raises:
        ConfigError: something has changed, such as a previous stage that was trained again; the message names it.
    """
    output = Path(run.output)
    now = _rows_there(run)
    with suppress(ConfigError):  # the folder of start_from may hold no model any more
        now |= _parts_content(run)
    before = _recorded(output)
    changed = sorted(what for what in before.keys() & now.keys() if before[what] != now[what])
    if changed:
        raise ConfigError(
            f"'{output}' holds this run, finished, but changed since it began: {', '.join(changed)}. Remove '{output}' "
            "to train again, choose another output, restore what changed, or train a later stage alone (visper train)"
        )


def _rows_there(run: Run) -> dict[str, str]:
    """``rows_content`` of what is on this machine: without rows or images that were removed or are on the hub."""
    try:
        sources = row_files(run.data)
        if any(source.kind == "hf" and not Path(source.place).exists() for source in sources):
            return {}
        return rows_content(open_records(sources, DropList()), images_lost=False)
    except (ConfigError, DataError, OSError):
        return {}


def _recorded(output: Path) -> dict[str, str]:
    file = output / CONTENT
    try:
        recorded: dict[str, str] = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(recorded, dict):
            raise TypeError("expected keys with digests")
        return recorded
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"unknown whether the run in '{output}' was trained on the current content, because '{file}' cannot be "
            f"read ({error}): restore the file, remove '{output}' to train again, or continue an unfinished run with "
            "`visper train RUN.yaml --resume --accept-changes`"
        ) from error


def _parts(run: Run) -> Iterator[tuple[str, str]]:
    named = ((part, getattr(run.student, part, None)) for part in ("vlm", "llm", "encoder"))
    yield from ((f"student.{part}", place) for part, place in named if place is not None)
    if run.start_from is not None:
        yield "start_from", student_place(run.start_from)
    yield from (("data.drop_list", place) for place in run.data.drop_list)
    if run.distillation is not None and run.distillation.targets is not None:
        yield "distillation.targets", str(Path(run.distillation.targets) / STORE)
    for task, settings in (run.distillation.tasks if run.distillation else {}).items():
        if settings.target.model is not None:
            yield f"the teacher of '{task}'", settings.target.model


def _own_kinds(run: Run) -> Iterator[str]:
    """The teachers, heads and losses of the user's own, as "module:name"."""
    for task in run.distillation.tasks.values() if run.distillation else ():
        kinds = (task.target.kind, task.head.kind, *task.loss)
        yield from (kind for kind in kinds if ":" in kind and not kind.startswith("visper."))


def _digest_of_images(contents: Sequence[bytes | None]) -> str:
    total = xxhash.xxh3_128()
    for content in contents:
        total.update(b"\0" if content is None else content)
    return total.hexdigest()


def _sampled_images(records: Records) -> list[bytes | None]:
    """The images of ``SAMPLED`` rows, the same ones whatever rows were dropped; None for a missing file."""
    everything = Records(records.parts)
    shown = np.flatnonzero(everything.has_image)
    rows = shown[np.linspace(0, len(shown) - 1, min(len(shown), SAMPLED)).astype(int)].tolist()
    with ThreadPoolExecutor(_THREADS) as threads:
        return [one for contents in threads.map(lambda row: _contents(everything, row), rows) for one in contents]


def _contents(records: Records, row: int) -> list[bytes | None]:
    try:
        return contents_of(records, row)
    except DataError:  # training skips the row
        return []
