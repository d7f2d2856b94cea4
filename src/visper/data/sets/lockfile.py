"""The lock file ``visper-data.lock.json`` under the root: size and SHA-256 of each download, per file and source.

Trust on first use: the identity recorded at the first download is required at every later one. The file contains no
times and no absolute paths, so copied to another root it requires the same bytes there.
"""

from __future__ import annotations

import json
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from visper.common.errors import DataError
from visper.common.files import write_text

LOCKFILE = "visper-data.lock.json"


@dataclass(frozen=True)
class Entry:
    """One file's recorded identity."""

    bytes: int
    sha256: str


class Lockfile:
    """The lock file, rewritten at each change; thread-safe (the root's lock excludes other processes)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._guard = threading.Lock()
        self._data: dict[str, Any] = {"version": 1, "files": {}, "parts": {}, "unfinished": []}
        if path.is_file():
            try:
                self._data.update(json.loads(path.read_bytes()))
            except (ValueError, TypeError) as error:
                raise DataError(
                    "broken lock file", f"'{path}': {error}; restore it, or remove it to trust the next downloads"
                ) from error

    def entry(self, name: str, source: str) -> Entry | None:
        """The recorded identity of a file from this source."""
        found = self._data["files"].get(name, {}).get(source)
        return Entry(**found) if found else None

    def recorded(self, name: str) -> list[Entry]:
        """The recorded identities of a file from all sources."""
        return [Entry(**found) for found in self._data["files"].get(name, {}).values()]

    def sources(self, name: str) -> list[str]:
        """The recorded sources of a file."""
        return list(self._data["files"].get(name, {}))

    def record(self, name: str, source: str, entry: Entry) -> None:
        """Records a file's identity."""
        with self._guard:
            self._data["files"].setdefault(name, {})[source] = asdict(entry)
            self._write()

    def forget(self, download: str) -> None:
        """Removes the records of a download that turned out to be broken."""
        with self._guard:
            for name in self._data["parts"].pop(download, {}):
                self._data["files"].pop(name, None)
            self._write()

    def parts(self, download: str) -> dict[str, Entry]:
        """The files of a download, in order; empty until all of them have arrived."""
        return {name: Entry(**found) for name, found in self._data["parts"].get(download, {}).items()}

    def set_parts(self, download: str, parts: dict[str, Entry]) -> None:
        """Records that a download is complete."""
        with self._guard:
            if self.parts(download) != parts:
                self._data["parts"][download] = {name: asdict(entry) for name, entry in sorted(parts.items())}
                self._write()

    def unfinished(self) -> list[str]:
        """Sets whose preparation has begun but not finished."""
        return list(self._data["unfinished"])

    def set_unfinished(self, names: list[str], unfinished: bool) -> None:
        """Records that preparations begin, or that they have finished."""
        with self._guard:
            rest = set(self._data["unfinished"]) - set(names)
            wanted = sorted(rest | set(names) if unfinished else rest)
            if wanted != self._data["unfinished"]:
                self._data["unfinished"] = wanted
                self._write()

    def _write(self) -> None:
        write_text(self.path, json.dumps(self._data, indent=1, sort_keys=True) + "\n")
