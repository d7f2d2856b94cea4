"""What was downloaded, in ``visper-data.lock.json`` under the root: size and SHA-256 per file and source.

Trust on first use: what is recorded at the first download must come again at every later one. The file holds no times
and no machine's paths of its own making, so copied to another root it makes that root hold the same bytes.
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
    """The lock file, written whole at each change; safe between threads (the root's lock keeps processes apart)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._guard = threading.Lock()
        self._data: dict[str, Any] = {"version": 1, "files": {}, "parts": {}, "unfinished": []}
        if path.is_file():
            try:
                self._data.update(json.loads(path.read_bytes()))
            except (ValueError, TypeError) as error:
                raise DataError(
                    "broken lock file", f"'{path}': {error}; restore it, or remove it to trust anew"
                ) from error

    def entry(self, name: str, source: str) -> Entry | None:
        """What was recorded for a file from this source."""
        found = self._data["files"].get(name, {}).get(source)
        return Entry(**found) if found else None

    def recorded(self, name: str) -> list[Entry]:
        """What was recorded for a file, from any source."""
        return [Entry(**found) for found in self._data["files"].get(name, {}).values()]

    def record(self, name: str, source: str, entry: Entry) -> None:
        """Notes a file's identity."""
        with self._guard:
            self._data["files"].setdefault(name, {})[source] = asdict(entry)
            self._write()

    def forget(self, download: str) -> None:
        """Takes back what was recorded for a download that turned out to be broken."""
        with self._guard:
            for name in self._data["parts"].pop(download, {}):
                self._data["files"].pop(name, None)
            self._write()

    def parts(self, download: str) -> dict[str, Entry]:
        """The files that a download consisted of, once all had arrived, in their order; empty before."""
        return {name: Entry(**found) for name, found in self._data["parts"].get(download, {}).items()}

    def set_parts(self, download: str, parts: dict[str, Entry]) -> None:
        """Notes that a download is whole."""
        with self._guard:
            if self.parts(download) != parts:
                self._data["parts"][download] = {name: asdict(entry) for name, entry in sorted(parts.items())}
                self._write()

    def unfinished(self) -> list[str]:
        """Sets whose preparation began and did not end."""
        return list(self._data["unfinished"])

    def set_unfinished(self, names: list[str], unfinished: bool) -> None:
        """Notes that preparations begin, or that they ended well."""
        with self._guard:
            rest = set(self._data["unfinished"]) - set(names)
            wanted = sorted(rest | set(names) if unfinished else rest)
            if wanted != self._data["unfinished"]:
                self._data["unfinished"] = wanted
                self._write()

    def _write(self) -> None:
        write_text(self.path, json.dumps(self._data, indent=1, sort_keys=True) + "\n")
