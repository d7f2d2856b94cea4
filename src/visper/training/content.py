"""Digests of a run's rows, images and initial weights, so that a resume with changed content is refused.

``content.json`` in the output folder holds digests of

- the rows of each source, as they were read: ids, roles, texts, image names;
- the images of ``SAMPLED`` evenly spaced rows, since reading all images of a large set takes minutes. This detects that
  all images were replaced, but rarely that a single one was;
- each local folder or file that weights are loaded from. The first process reads it at every start, at the speed of the
  disk; loading then reads it from the page cache.

Hub models are pinned to commits in ``run.yaml``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import xxhash

from visper.common.errors import ConfigError, DataError
from visper.common.manifest import content_digest, digest_of
from visper.config import Run
from visper.data.checks.digests import contents_of
from visper.data.rows.records import Record
from visper.data.rows.table import Records
from visper.model.student import student_place

CONTENT = "content.json"
SAMPLED = 256
_THREADS = 16


def content_of(run: Run, records: Sequence[Record]) -> dict[str, str]:
    """The digests of all local content of the run, by the description that error messages use."""
    assert isinstance(records, Records), "the rows must come from open_records"
    found = rows_content(records)
    places = [(what, Path(name)) for what, name in _parts(run)]
    return found | {f"{what} '{place}'": content_digest(place) for what, place in places if place.exists()}


def rows_content(records: Records) -> dict[str, str]:
    """The digests of the rows' sources and of a sample of their images, by description."""
    found = {f"the rows of '{part.name}'": digest_of(part.table.path) for part in records.parts}
    return found | {"images": _images(records)}


def require_same_content(output: Path, content: dict[str, str]) -> None:
    """Checks that ``content`` equals the digests that the run in ``output`` started with.

    Raises:
        ConfigError: something has changed; the message names it.
    """
    file = output / CONTENT
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
        changed = sorted(what for what in before.keys() | content.keys() if before.get(what) != content.get(what))
    except (OSError, ValueError, AttributeError) as error:
        changed = [f"unknown, because '{file}' cannot be read ({error})"]
    if changed:
        raise ConfigError(
            f"changed since the run in '{output}' began: {', '.join(changed)}. Restore it, or continue with the "
            "current content: `visper train RUN.yaml --resume --accept-changes`"
        )


def _parts(run: Run) -> Iterator[tuple[str, str]]:
    named = ((part, getattr(run.student, part, None)) for part in ("vlm", "llm", "encoder"))
    yield from ((f"student.{part}", place) for part, place in named if place is not None)
    if run.start_from is not None:
        yield "start_from", student_place(run.start_from)
    for task, settings in (run.distillation.tasks if run.distillation else {}).items():
        if settings.target.model is not None:
            yield f"the teacher of '{task}'", settings.target.model


def _images(records: Records) -> str:
    shown = np.flatnonzero(records.has_image)
    rows = shown[np.linspace(0, len(shown) - 1, min(len(shown), SAMPLED)).astype(int)].tolist()
    total = xxhash.xxh3_128()
    with ThreadPoolExecutor(_THREADS) as threads:
        for contents in threads.map(lambda row: _contents(records, row), rows):
            for content in contents:
                total.update(b"\0" if content is None else content)
    return total.hexdigest()


def _contents(records: Records, row: int) -> list[bytes | None]:
    try:
        return contents_of(records, row)
    except DataError:  # training skips the row
        return []
