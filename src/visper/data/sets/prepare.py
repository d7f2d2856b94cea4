"""``visper data prepare``: from the catalogue's pages to files in their places, whole or absent, safe to repeat.

Under the root lie the files that rows name, ``archives/`` until they are dropped, ``visper-data.lock.json``, and
``.visper/`` with what is unfinished: parts of downloads (continued by the next run), one staged file (thrown away), the
lists of the archives' members (so that nothing is fetched again to learn that nothing is missing).
"""

from __future__ import annotations

import filecmp
import shutil
import threading
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from heapq import nlargest
from itertools import chain
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from visper.common.console import Console
from visper.common.errors import DataError
from visper.common.files import remove_leftovers
from visper.common.lock import locked
from visper.data.rows.formats import image_names
from visper.data.sets.archives import content_fault, relative_path
from visper.data.sets.background import in_background
from visper.data.sets.catalog import DataSet, Download, Origin, with_needs
from visper.data.sets.fetch import (
    FOUND,
    ProgressBar,
    Remote,
    RetryPolicy,
    SourceError,
    obtain,
    require_room,
    without_queries,
)
from visper.data.sets.lockfile import LOCKFILE, Entry, Lockfile
from visper.data.sets.origins import remotes
from visper.data.sets.unpack import MEMBERS, STATE, Request, Summary, Unpacker, absent

PARTS = "parts"


def prepare(
    name: str,
    root: Path,
    everything: bool = False,
    drop_archives: bool = False,
    workers: int = 4,
    console: Console | None = None,
    patience: RetryPolicy | None = None,
    again: Collection[str] = (),
) -> Summary:
    """Brings a set and what it needs under a root. Safe to kill at any moment and to repeat; a second run waits.

    Args:
        name: of the catalogue, or a YAML file like its entries.
        everything: unpack all members, not only those that the rows name.
        drop_archives: delete archives once nothing of them is missing.
        workers: downloads at once.
        again: places under the root to bring anew though something lies there; it stays until the new file is whole.

    Raises:
        ConfigError: the name is unknown or a description wrong.
        DataError: something could not be fetched or unpacked (the rest is there), or the disk is too small.
    """
    sets = with_needs(name)
    console = console or Console()
    with locked(root / STATE, console, wait=True):
        # Only what a preparation writes: a run may be writing its tables beside, into the same folder.
        own = ((root / STATE / folder).rglob(".*") for folder in (PARTS, MEMBERS))
        remove_leftovers(chain(root.glob(f".{LOCKFILE}.*"), *own))
        preparation = _Preparation(root, everything, drop_archives, workers, console, patience or RetryPolicy())
        return preparation.run(sets, set(again))


class _Preparation:
    def __init__(
        self, root: Path, everything: bool, drop: bool, workers: int, console: Console, patience: RetryPolicy
    ) -> None:
        self.root, self.everything, self.drop, self.workers = root, everything, drop, workers
        self.console, self.patience = console, patience
        self.stop = threading.Event()
        self.lockfile = Lockfile(root / LOCKFILE)
        self.outcome = Summary()
        self.failures: dict[str, str] = {}
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        self.progress = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
        self.unpacker = Unpacker(root, self.lockfile, self.outcome, self.progress, self.stop)

    def run(self, sets: list[tuple[DataSet, Path]], again: set[str]) -> Summary:
        """The story: rows first, then what they name, then a look at what is still absent."""
        self.unpacker.again = again
        set_names = [data_set.name for data_set, _ in sets]
        rows = [part for data_set, _ in sets for part in data_set.rows]
        downloads = [(download, folder) for data_set, folder in sets for download in data_set.downloads]
        self.lockfile.set_unfinished(set_names, True)
        with self.progress:
            self._bring([Request(d, f, set() if d.unpack else None, not _waits(d)) for d, f in downloads if _first(d)])
            files = [(self.root / part.json_file, part.images) for part in rows]
            unread = [part.json_file for part in rows if not (self.root / part.json_file).is_file()]
            if unread and not self.failures:
                self.failures[unread[0]] = "no download of the set brings these rows: name them in 'file' or 'only'"
            if not unread and not any(part.json_file in self.failures for part in rows):
                names = None if self.everything or not rows else self._named(files, [d for d, _ in downloads])
                self._bring([Request(d, f, names) for d, f in downloads if _waits(d)])
                if names is not None:
                    self.outcome.named, self.outcome.absent = len(names), sorted(absent(self.root, names))
        if self.failures:
            raise DataError(
                "not everything could be prepared",
                "\n".join(f"{file}: {fault}" for file, fault in self.failures.items()),
            )
        self.lockfile.set_unfinished(set_names, False)
        return self.outcome

    def _named(self, files: list[tuple[Path, str]], downloads: list[Download]) -> set[str]:
        """Places under the root that rows name. Rows that cannot be read are not trusted any more."""
        found = set()
        for file, images in files:
            self.console.print(f"reading {file}")
            try:
                names = list(image_names(file))
            except DataError:
                for download in downloads:
                    if not download.unpack and download.place(self.root, download.file) == file:
                        self._distrust(download)
                raise
            for name in names:
                try:
                    found.add(relative_path(f"{images}/{name}" if images and not name.startswith("/") else name))
                except DataError:
                    self.console.print(f"{file.name} names {name[:200]!r}, outside its folder: left out")
        return found

    def _bring(self, wanted: list[Request]) -> None:
        """Downloads side by side and unpacks each as it arrives; a failure lets the others go on."""
        self.failures |= {
            item.download.file: fault for item in wanted if (fault := self._other_identity(item.download))
        }
        wanted = [item for item in wanted if item.download.file not in self.failures]
        todo = [item for item in wanted if self._needs(item)]
        sizes = [size for item in todo if (size := self._still_to_come(item.download))]
        least = sum(nlargest(self.workers, sizes)) if self.drop else sum(sizes)
        require_room(self.root, least, f"fetching {', '.join(item.download.file for item in todo)}")
        pool = ThreadPoolExecutor(max(1, self.workers))
        try:
            arriving = {pool.submit(self._obtain, item): item for item in todo}
            for future in as_completed(arriving):
                item = arriving[future]
                try:
                    self._unpack(item, future.result())
                    self._drop_archives(item)
                except Exception as error:  # noqa: BLE001 - of one file, whatever it is: the others go on
                    text = str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
                    self.failures[item.download.file] = without_queries(text)
        except BaseException:
            self.stop.set()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        for item in wanted:
            if item not in todo:
                self._drop_archives(item)

    def _needs(self, item: Request) -> bool:
        """Whether something of a download is missing, or a local file may have changed."""
        if item.download.unpack:
            return self.unpacker.lacks(item)
        for name in self.unpacker.again & {*self.lockfile.parts(item.download.file), item.download.file}:
            (self.root / name).unlink(missing_ok=True)  # of no archive: nothing would be fetched over it
        return not self._at_hand(item.download) or any(o.is_local for o in item.download.sources)

    def _other_identity(self, download: Download) -> str | None:
        """How what was recorded differs from what the description publishes now; None: in nothing."""
        for name, entry in self.lockfile.parts(download.file).items():
            found = {"sha256": entry.sha256, "bytes": entry.bytes}
            for key, published in (("sha256", download.sha256), ("bytes", download.exact_bytes)):
                if published is not None and published != found[key]:
                    return (
                        f"prepared from a file of {key} {found[key]}, the set's description now says {published}: "
                        f"choose another --root, or remove '{name}' from {LOCKFILE} and its files under the root"
                    )
        return None

    def _at_hand(self, download: Download) -> list[Path]:
        """The files of a download if all lie in their places with the recorded sizes; else none."""
        parts = self.lockfile.parts(download.file)
        found = [download.place(self.root, name) for name in parts]
        sizes = [entry.bytes for entry in parts.values()]
        whole = all(file.is_file() and file.stat().st_size == size for file, size in zip(found, sizes, strict=True))
        return found if whole else []

    def _still_to_come(self, download: Download) -> int:
        part, place = self._part(download.file), download.place(self.root, download.file)
        if place.is_file() or self._at_hand(download):
            return 0
        return max(0, (download.estimate or 0) - (part.stat().st_size if part.is_file() else 0))

    def _part(self, name: str) -> Path:
        return self.root / STATE / PARTS / name

    def _obtain(self, item: Request) -> list[Path]:
        """All files of a download, from the first source that gives them; runs in a thread of its own."""
        download = item.download
        hash_is_published = bool(download.sha256 or download.md5)
        if download.unpack and not hash_is_published and (found := self._at_hand(download)):
            return found
        place = download.place(self.root, download.file)
        if place.is_file() and not any(origin.is_local for origin in download.sources):
            known = Remote(download.file, FOUND, "", None, {}, download.exact_bytes, download.sha256, download.md5)
            meter = ProgressBar(self.progress, self.stop, download.file)
            self.lockfile.set_parts(download.file, {download.file: self._fetch(known, download, meter)})
            return [place]
        errors = []
        for origin, label in zip(download.sources, download.labels, strict=True):
            meter = ProgressBar(self.progress, self.stop, download.file)
            try:
                files = self._remotes(download, origin, item.folder)
                if files[0].local is not None:
                    return [self._local(files[0], files[0].local, download)]
                parts = {remote.name: self._fetch(remote, download, meter) for remote in files}
            except SourceError as error:
                errors.append(without_queries(f"{label}: {error}"))
                meter.say(errors[-1])
                continue
            finally:
                meter.end()
            self.lockfile.set_parts(download.file, parts)
            return [download.place(self.root, name) for name in parts]
        raise DataError(
            "no source gave it",
            f"{'; '.join(errors)}. What came is kept: repeat later, or put the file at '{place}' yourself",
        )

    def _remotes(self, download: Download, origin: Origin, folder: Path) -> list[Remote]:
        """The files of an origin; the hub's client would wait for a silent server for ever, deaf to Ctrl-C."""
        asked = (remotes(download, origin, folder) for _ in range(1))
        with closing(in_background(asked, self.stop, 2 * self.patience.timeout)) as listed:
            try:
                return next(listed)
            except TimeoutError as error:
                raise SourceError(f"its files could not be listed: {error}") from error

    def _fetch(self, remote: Remote, download: Download, meter: ProgressBar) -> Entry:
        place = download.place(self.root, remote.name)
        was_there = place.is_file()
        unpacks = bool(download.unpack)
        entry = obtain(remote, place, self._part(remote.name), unpacks, self.lockfile, meter, self.patience)
        if not was_there:
            self.outcome.fetched.append(remote.name)
        return entry

    def _local(self, remote: Remote, local: Path, download: Download) -> Path:
        """A file or folder of this machine: archives are read where they lie, other files copied when they differ."""
        fault = content_fault(local, bool(download.unpack), remote.name) if local.is_file() else None
        if fault is not None:
            raise SourceError(fault)
        if download.unpack:
            return local
        if local.is_dir():
            raise SourceError("it is a folder: say with 'unpack' where its files belong")
        place, copy = download.place(self.root, remote.name), self._part(f"{remote.name}.copy")
        if not place.is_file() or not filecmp.cmp(local, place, shallow=False):
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(local, copy)
            place.parent.mkdir(parents=True, exist_ok=True)
            copy.replace(place)
            self.outcome.fetched.append(remote.name)
        return place

    def _unpack(self, item: Request, paths: list[Path], retry: bool = True) -> None:
        """Unpacks a download's archives. A broken one is not trusted any more, and fetched once more."""
        if not item.download.unpack:
            return
        try:
            for path in paths:
                self.unpacker.unpack(item, path)
        except DataError as error:
            if error.reason != "broken archive" or not self._distrust(item.download) or not retry:
                raise
            self.console.print(f"{error}; fetching it again")
            self._unpack(item, self._obtain(item), retry=False)

    def _distrust(self, download: Download) -> bool:
        """Forgets a broken download and deletes it, unless a person put it there. Returns whether it is deleted."""
        names = list(self.lockfile.parts(download.file))
        ours = bool(names) and not any(self.lockfile.entry(name, FOUND) for name in names)
        self.lockfile.forget(download.file)
        for name in names if ours else ():
            download.place(self.root, name).unlink(missing_ok=True)
        return ours

    def _drop_archives(self, item: Request) -> None:
        if self.drop and item.download.unpack and item.last and not self.unpacker.lacks(item):
            for name in self.lockfile.parts(item.download.file):
                item.download.place(self.root, name).unlink(missing_ok=True)


def _first(download: Download) -> bool:
    """Whether it may bring rows, or what is wanted whatever the rows name."""
    return not download.unpack or any(unpack.only for unpack in download.unpack)


def _waits(download: Download) -> bool:
    """Whether rows say what is wanted of it."""
    return any(not unpack.only for unpack in download.unpack)
