"""Results of file checks, appended line by line, so that an interrupted check resumes where it stopped and a repeated
one takes seconds. A file that has changed is checked again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from visper.common.errors import DataError
from visper.common.files import inside, naming

_THREADS, _WRITE_EVERY = 32, 256
Values = list[Any]
"""The result for one file, as JSON values."""


def of_files(
    places: Sequence[tuple[Path, str]], kept: Path, look: Callable[[list[str]], Iterable[Values | None]]
) -> tuple[dict[str, Values], dict[str, DataError]]:
    """The results of all files by path, and the errors of files outside their folder, which are not opened.

    Args:
        places: folder of each file and its name there, each once.
        kept: JSONL file of path, stamp and values; the last line about a file counts.
        look: gives the values of files without a kept result, in order; None for a file without a result.
    """
    before = _read(kept)
    with ThreadPoolExecutor(_THREADS) as threads:
        paths = [str(folder / name) for folder, name in places]
        stamps = dict(zip(paths, threads.map(_stamp, places), strict=True))
    outside = {path: stamp for path, stamp in stamps.items() if isinstance(stamp, DataError)}
    found = {path: before[path][1] for path in paths if path in before and before[path][0] == stamps[path] != ""}
    new = [path for path in stamps if path not in found and path not in outside]
    if not new:
        return found, outside
    kept.parent.mkdir(parents=True, exist_ok=True)
    with naming(kept), kept.open("a", encoding="utf-8") as lines:
        lines.write("\n")  # ends a line that an earlier check may have left half written
        for number, (path, values) in enumerate(zip(new, look(new), strict=True), 1):
            if values is not None:
                found[path] = values
                if stamps[path]:
                    lines.write(json.dumps([path, stamps[path], *values]) + "\n")
            if number % _WRITE_EVERY == 0:
                lines.flush()
    return found, outside


def _stamp(place: tuple[Path, str]) -> str | DataError:
    """A text that changes when the file does; empty if the file does not exist, whose result is not kept."""
    try:
        found = os.stat(inside(*place))  # noqa: PTH116 (takes a third of the time; there may be 350,000 files)
    except DataError as error:
        return error
    except OSError:
        return ""
    return f"{found.st_size}-{found.st_mtime_ns}-{found.st_ctime_ns}"


def _read(kept: Path) -> dict[str, tuple[str, Values]]:
    if not kept.is_file():
        return {}
    found = {}
    for line in kept.read_text(encoding="utf-8").split("\n"):
        try:
            path, stamp, *values = json.loads(line)
            found[path] = (stamp, values)
        except (ValueError, TypeError):
            continue  # empty, or half written when an earlier check was killed
    return found
