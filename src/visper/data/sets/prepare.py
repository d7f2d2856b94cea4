"""``visper data prepare``: downloads and unpacks data sets; files are complete or absent, and it is safe to repeat.

The root contains the files that rows name, ``archives/`` until they are deleted, ``visper-data.lock.json``, and
``.visper/`` with unfinished files: partial downloads (continued by the next run), one staged file (deleted by it), and
lists of the archives' members (so that archives need not be fetched again to see that nothing is missing).
"""

from __future__ import annotations

import filecmp
import shutil
import threading
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from fnmatch import fnmatchcase
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
    """Downloads and unpacks a set and the sets it needs. Safe to kill at any moment and to repeat; a second run waits.

    Args:
        name: a set of the catalog, or a YAML file like its entries.
        root: the folder of all data sets.
        everything: unpack all members, not only those that the rows name.
        drop_archives: delete archives once all their members are unpacked.
        workers: number of parallel downloads.
        patience: how long to wait for servers.
        again: paths under the root to fetch again; an existing file is kept until the new one is complete.

    Raises:
        ConfigError: the name is unknown or a description is wrong.
        DataError: something could not be fetched or unpacked (the rest was), or the disk is full.
    """
    sets = with_needs(name)
    console = console or Console()
    with locked(root / STATE, console, wait=True):
        # Only files of a preparation: a run may be writing its tables into the same folder.
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
        """Fetches the rows, then the files that they name, then lists what is still absent."""
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
                self.failures[unread[0]] = "no download of the set provides these rows: name them in 'file' or 'only'"
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
        """The paths under the root that rows name. A download of rows that cannot be read is discarded."""
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
        """Downloads in parallel and unpacks each download when it arrives; after a failure the others continue."""
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
                except Exception as error:  # noqa: BLE001 - any failure of one file: the others continue
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
        """Whether files of a download are missing, or a local file may have changed."""
        if item.download.unpack:
            return self.unpacker.lacks(item)
        for name in self.unpacker.again & {*self.lockfile.parts(item.download.file), item.download.file}:
            (self.root / name).unlink(missing_ok=True)  # not from an archive: it is only fetched if it is absent
        return not self._at_hand(item.download) or any(o.is_local for o in item.download.sources)

    def _other_identity(self, download: Download) -> str | None:
        """How the recorded identity differs from the one in the set's description; None if it does not.

        Without a published hash, the content of a source that was not recorded is unknown.
        """
        named = [without_queries(label) for label in download.labels]
        for name, entry in self.lockfile.parts(download.file).items():
            found = {"sha256": entry.sha256, "bytes": entry.bytes}
            differences = [
                f"a file of {key} {found[key]}, but the set's description now says {published}"
                for key, published in (("sha256", download.sha256), ("bytes", download.exact_bytes))
                if published is not None and published != found[key]
            ]
            before = self.lockfile.sources(name)
            known = any(one in (FOUND, label) or fnmatchcase(one, label) for one in before for label in named)
            if before and not (known or download.sha256 or download.md5):
                differences.append(f"{before[0]}, but the set's description now names {named[0]}")
            if differences:
                return (
                    f"prepared from {differences[0]}: choose another --root, or remove '{name}' from {LOCKFILE} and "
                    "its files under the root"
                )
        return None

    def _at_hand(self, download: Download) -> list[Path]:
        """The files of a download if all exist with the recorded sizes; else an empty list."""
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
        """The files of a download, fetched from the first source that provides them; runs in a worker thread."""
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
            f"{'; '.join(errors)}. Partial downloads are kept: repeat later, or put the file at '{place}' yourself",
        )

    def _remotes(self, download: Download, origin: Origin, folder: Path) -> list[Remote]:
        """The files of an origin, with a time limit: the hub's client would wait forever and ignore Ctrl-C."""
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
        """A local file or folder: archives are read in place, other files are copied if they differ."""
        fault = content_fault(local, bool(download.unpack), remote.name) if local.is_file() else None
        if fault is not None:
            raise SourceError(fault)
        if download.unpack:
            return local
        if local.is_dir():
            raise SourceError("it is a folder: give 'unpack' to say where its files belong")
        place, copy = download.place(self.root, remote.name), self._part(f"{remote.name}.copy")
        if not place.is_file() or not filecmp.cmp(local, place, shallow=False):
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(local, copy)
            place.parent.mkdir(parents=True, exist_ok=True)
            copy.replace(place)
            self.outcome.fetched.append(remote.name)
        return place

    def _unpack(self, item: Request, paths: list[Path], retry: bool = True) -> None:
        """Unpacks a download's archives. A broken one is discarded and fetched once more."""
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
        """Removes a broken download from the lock file, and deletes it unless a user put it there; returns whether."""
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
    """Whether it may contain rows, or members that are needed whatever the rows name."""
    return not download.unpack or any(unpack.only for unpack in download.unpack)


def _waits(download: Download) -> bool:
    """Whether the rows decide which of its members are needed."""
    return any(not unpack.only for unpack in download.unpack)
