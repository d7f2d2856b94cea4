"""Unpacks archives: only members that are needed and absent, normalized, each moved to its place by one rename."""

from __future__ import annotations

import json
import os
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import Progress

from visper.common.cache import key
from visper.common.errors import DataError
from visper.common.files import inside, write_text
from visper.data.normalize import make_canonical
from visper.data.sets.archives import Member, list_members, read_chunks, read_members, target_paths
from visper.data.sets.background import ProgressBar, require_room
from visper.data.sets.catalog import ARCHIVES, Download, Unpack
from visper.data.sets.lockfile import LOCKFILE, Lockfile

STATE = ".visper"
"""Folder under the root for unfinished files and lists of archive members."""
MEMBERS = "members"
RESERVED = (ARCHIVES, STATE, LOCKFILE)
"""Places under the root that archives may not write to: another set would take such a file for its own download."""


@dataclass
class Summary:
    """The result of a preparation. Names are paths under the root."""

    fetched: list[str] = field(default_factory=list)
    unpacked: int = 0
    repaired: Counter[str] = field(default_factory=Counter)
    unreadable: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    named: int = 0

    @property
    def nothing_done(self) -> bool:
        """Whether everything was present before."""
        return not self.fetched and not self.unpacked

    def __str__(self) -> str:
        """A summary for the console."""
        lines = [f"{len(self.fetched)} files fetched, {self.unpacked} unpacked"]
        if self.nothing_done:
            lines = ["nothing to do"]
        if self.repaired:
            counts = ", ".join(f"{count} {fault}" for fault, count in self.repaired.most_common())
            lines.append(f"re-encoded as JPEG: {counts}")
        for what, found in (("cannot be decoded", self.unreadable), ("are in no archive", self.absent)):
            if found:
                lines.append(f"{len(found)} files {what}, first {found[:3]}")
        if self.named:
            lines.append(f"{self.named - len(self.absent)} of {self.named} files named by rows are present")
        return "; ".join(lines)


@dataclass(frozen=True)
class Request:
    """A request to unpack a download."""

    download: Download
    folder: Path  # its local paths are relative to it
    names: set[str] | None  # the needed paths under the root; None: all
    last: bool = True  # of the requests for its archives in this run


class Unpacker:
    """Unpacks under one root, one member at a time. If the process dies, the next run deletes the ``staged`` file."""

    def __init__(
        self, root: Path, lockfile: Lockfile, outcome: Summary, progress: Progress, stop: threading.Event
    ) -> None:
        self.root, self.lockfile, self.outcome = root, lockfile, outcome
        self.progress, self.stop = progress, stop
        self.staged = root / STATE / "staged"
        self.staged.unlink(missing_ok=True)
        self.again: set[str] = set()
        """Paths that count as absent, although they exist, until they are written again."""

    def lacks(self, item: Request) -> bool:
        """Whether needed members of a download may be absent or old, judged without opening its archives."""
        places = [item.folder / str(origin.path) for origin in item.download.sources if origin.is_local]
        if len(places) == len(item.download.sources):  # else another source may be taken
            taken = next((place for place in places if place.exists()), None)
            if taken is not None and self._is_other(item.download, taken):
                return True
        listed = self._listed(item.download)
        for unpack in item.download.unpack:
            if listed is not None:
                here = set().union(*(target_paths(members, **unpack.model_dump()) for members in listed))
                here = _needed(here, unpack, item.names)
            elif item.names is not None and not unpack.only:
                here = _under(item.names, unpack)
            else:
                return True
            if self._absent(here):
                return True
        return False

    def unpack(self, item: Request, path: Path) -> None:
        """Unpacks the needed and absent members of an archive or folder to their places.

        If it has changed since it was unpacked, those that are there are removed first, so that after a kill, too, old
        and new ones are not mixed.

        Raises:
            DataError: the archive is unsafe, broken or has an unexpected layout, or the disk is full.
        """
        download = item.download
        changed = self._is_other(download, path)
        old: set[str] = set()
        members = list_members(path, [unpack.inner for unpack in download.unpack if unpack.inner])
        todo: dict[Member, list[str]] = {}
        for unpack in download.unpack:
            here = target_paths(members, **unpack.model_dump())
            needed = _needed(set(here), unpack, item.names)
            several = len(self.lockfile.parts(download.file)) > 1
            if not needed and not several and item.names is not None and _under(item.names, unpack):
                raise DataError(
                    "unexpected layout",
                    f"'{path}' contains none of the files that rows name under '{unpack.to}/'; it would unpack, for "
                    f"example, {sorted(here)[:3]}",
                )
            there = set(here) - absent(self.root, here) if changed else set()
            if path.is_dir():  # which may itself be where its files belong
                there = {place for place in there if not (path / here[place].name).samefile(self.root / place)}
            for place in needed | there:
                if place.split("/")[0].casefold() in RESERVED:
                    raise DataError("unsafe archive", f"'{path}': '{place}' is reserved for downloads")
            for place in self._absent(needed) | there:
                inside(self.root, place)
                todo.setdefault(here[place], []).append(place)
            old |= there
        for place in old:
            (self.root / place).unlink()
        self._list(download, path, members)
        if todo:
            self._write(path, todo)

    def _write(self, path: Path, todo: dict[Member, list[str]]) -> None:
        total = sum(member.size * len(found) for member, found in todo.items())
        require_room(self.root, total, f"unpacking {len(todo)} files of '{path.name}'")
        meter = ProgressBar(self.progress, self.stop, path.name)
        meter.show("unpacking", 0, total)
        try:
            for member, stream in read_members(path, todo):
                for place in sorted(todo[member]):
                    stream.seek(0)
                    with self.staged.open("wb") as file:
                        for chunk in read_chunks(stream, path):
                            file.write(chunk)
                            meter.advance(len(chunk))
                    self._put(place)
        finally:
            meter.end()

    def _put(self, name: str) -> None:
        """Normalizes the staged file and moves it to its place."""
        try:
            repaired = make_canonical(self.staged, name)
        except DataError as error:  # kept unchanged: it is reported when it is read
            self.outcome.unreadable.append(f"{name}: {error.reason}")
            repaired = None
        if repaired is not None:
            self.outcome.repaired[repaired] += 1
        place = self.root / name
        place.parent.mkdir(parents=True, exist_ok=True)
        self.staged.replace(place)
        self.again.discard(name)
        self.outcome.unpacked += 1

    def _absent(self, names: set[str]) -> set[str]:
        return absent(self.root, names) | (names & self.again)

    def _list(self, download: Download, path: Path, members: list[Member]) -> None:
        """Saves an archive's list of members, for use after the archive is deleted or has changed."""
        file, identity = self._identity(download, path)
        text = json.dumps({"sha256": identity, "members": [(m.name, m.size, m.inner) for m in members]})
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            write_text(file, text)

    def _is_other(self, download: Download, path: Path) -> bool:
        """Whether another state of an archive or folder was unpacked before."""
        file, identity = self._identity(download, path)
        return self._listing(file).get("sha256", identity) != identity

    def _identity(self, download: Download, path: Path) -> tuple[Path, str]:
        """The file of an archive's list of members, and the SHA-256 or, for a local one, a key of sizes and dates."""
        for name, entry in self.lockfile.parts(download.file).items():
            if self.root / ARCHIVES / name == path:
                return self._list_file(name), entry.sha256
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        found = (f"{file.relative_to(path)} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)
        return self._list_file(f"{download.file}.local"), key(*found)

    def _listed(self, download: Download) -> list[list[Member]] | None:
        found = []
        for name, entry in self.lockfile.parts(download.file).items():
            listing = self._listing(self._list_file(name))
            if listing.get("sha256") != entry.sha256:
                return None
            found.append([Member(*member) for member in listing["members"]])
        return found or None

    @staticmethod
    def _listing(file: Path) -> dict[str, Any]:
        return dict(json.loads(file.read_bytes())) if file.is_file() else {}

    def _list_file(self, name: str) -> Path:
        return self.root / STATE / MEMBERS / f"{name}.json"


def absent(root: Path, names: Iterable[str]) -> set[str]:
    """The names that do not exist under the root. Each folder is listed once, however many of its files are named."""
    folders: dict[str, set[str]] = {}
    for name in names:
        folder, _, last = name.rpartition("/")
        folders.setdefault(folder, set()).add(last)
    found = set()
    for folder, lasts in folders.items():
        try:
            there = set(os.listdir(root / folder))  # noqa: PTH208 - faster, for hundreds of thousands of names
        except (FileNotFoundError, NotADirectoryError):
            there = set()
        found |= {f"{folder}/{last}" if folder else last for last in lasts - there}
    return found


def _needed(here: set[str], unpack: Unpack, names: set[str] | None) -> set[str]:
    return here if names is None or unpack.only else here & names


def _under(names: set[str], unpack: Unpack) -> set[str]:
    return {name for name in names if not unpack.to or name.startswith(f"{unpack.to}/")}
