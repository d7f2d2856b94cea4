"""Is this file an image, and the one its name says: every file of a data set, decoded on all cores.

What was found is kept line by line as it is found, so that an interrupted check goes on where it stopped, and one of a
data set that was checked before takes seconds. A file that has changed since is looked at again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from visper.common.cache import code_key, key
from visper.common.errors import DataError
from visper.common.files import inside
from visper.common.parallel import in_order
from visper.config.schema import MAX_PIXELS
from visper.data import decoding
from visper.data.decoding import opened
from visper.data.normalize import mislabeled

_WRITE_EVERY = 256


@dataclass(frozen=True)
class Verdict:
    """What a file is: its content's format, or why it is no image."""

    format: str | None = None
    reason: str | None = None
    detail: str = ""

    def mislabeled(self, path: str) -> bool:
        """Whether the content is a sound image of another format than the name says."""
        return self.format is not None and mislabeled(self.format, path)


def look(path: str, max_pixels: int = MAX_PIXELS) -> Verdict:
    """Decodes a file whole. A JPEG's compressed data is read to its end, its pixels made at an eighth of the size."""
    try:
        with opened(path, max_pixels=max_pixels) as image:
            image.seek(0)
            content = image.format
            image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))
            image.load()
    except DataError as error:
        return Verdict(None, error.reason, error.detail)
    return Verdict(content)


def look_at_all(
    folder: Path,
    names: Sequence[str],
    kept: Path,
    quiet: bool = False,
    workers: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> dict[str, Verdict]:
    """A verdict on every file by its path, those looked at before from ``kept``. Outside the folder nothing is opened.

    Args:
        folder: of the images.
        names: the files under it, each once.
        kept: JSONL file of verdicts; one line a file, the newest line counts.
        quiet: no progress bar.
        workers: processes; default: one a core, or none for a few files.
        max_pixels: of an image that is not called huge.
    """
    before = _read(kept)
    verdicts: dict[str, Verdict] = {}
    stamps: dict[str, str] = {}
    with ThreadPoolExecutor(32) as threads:
        for name, stamp in zip(names, threads.map(partial(_stamp_or_fault, folder), names), strict=True):
            path = str(folder / name)
            if isinstance(stamp, Verdict):
                verdicts[path] = stamp
                continue
            stamps[path] = stamp
            if path in before and before[path][0] == stamp != "":
                verdicts[path] = before[path][1]
    new = [path for path in stamps if path not in verdicts]
    kept.parent.mkdir(parents=True, exist_ok=True)
    with kept.open("a", encoding="utf-8") as lines:
        lines.write("\n")  # behind a line that an earlier check left half written
        found = in_order(partial(look, max_pixels=max_pixels), new, "looking at images", quiet, workers)
        for number, (path, verdict) in enumerate(zip(new, found, strict=True), 1):
            verdicts[path] = verdict
            if stamps[path]:
                entry = [path, stamps[path], verdict.format, verdict.reason, verdict.detail]
                lines.write(json.dumps(entry) + "\n")
            if number % _WRITE_EVERY == 0:
                lines.flush()
    return verdicts


def verdicts_file(folder: Path, root: Path, max_pixels: int = MAX_PIXELS) -> Path:
    """Where verdicts on the files under ``root`` are kept; others for another version of the look, or another limit."""
    return folder / f"images-{key(str(root.resolve()), max_pixels, code_key(decoding))}.jsonl"


def stamp_of(path: str) -> str:
    """What changes when the file does; empty where there is no file, on which no verdict is kept."""
    try:
        found = os.stat(path)  # noqa: PTH116 (a third of the time, for 350,000 files)
    except OSError:
        return ""
    return f"{found.st_size}-{found.st_mtime_ns}-{found.st_ctime_ns}"


def _stamp_or_fault(folder: Path, name: str) -> str | Verdict:
    try:
        return stamp_of(str(inside(folder, name)))
    except DataError as error:
        return Verdict(None, error.reason, error.detail)


def _read(kept: Path) -> Mapping[str, tuple[str, Verdict]]:
    if not kept.is_file():
        return {}
    found = {}
    for line in kept.read_text(encoding="utf-8").split("\n"):
        try:
            path, stamp, *verdict = json.loads(line)
            found[path] = (stamp, Verdict(*verdict))
        except (ValueError, TypeError):
            continue  # empty, or half written when the machine stopped
    return found
