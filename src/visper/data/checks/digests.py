"""Pictures by their content: the same bytes are the same picture, whatever the file's name, place or date.

What was hashed is kept line by line, so that an interrupted look goes on where it stopped and a second one takes
seconds. A file that has changed since is hashed again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.progress import track

from visper.data.checks.image_files import stamp_of
from visper.data.rows.records import Record
from visper.data.rows.table import Records

DIGEST_BYTES = 16
LOCKFILE = "digests.jsonl"
_THREADS, _AT_ONCE = 16, 512


def digest(content: bytes) -> bytes:
    """The first 16 bytes of a content's SHA-256."""
    return hashlib.sha256(content).digest()[:DIGEST_BYTES]


def content_of(records: Sequence[Record], index: int) -> bytes | None:
    """The bytes of a row's picture, from its source or its file; None where there is no picture or no such file."""
    held = records.picture(index) if isinstance(records, Records) else None
    image = records[index].image if held is None else None
    if image is None:
        return held
    try:
        return Path(image).read_bytes()
    except OSError:
        return None


def digests_of(records: Records, quiet: bool = True) -> list[bytes | None]:
    """The digest of every row's picture; None for a row without one, and where there is no such file."""
    files = records.image_files()
    lockfile = records.parts[0].table.path.parent / LOCKFILE
    of_file = _of_files([file for file in dict.fromkeys(files) if file is not None], lockfile, quiet)
    found = [None if file is None else of_file.get(file) for file in files]
    embedded = [i for i, has in enumerate(records.has_image.tolist()) if has and files[i] is None]
    # In the order of the files, which read rows in groups.
    order = sorted(embedded, key=lambda index: int(records.rows[index]))
    for index in track(order, description="hashing embedded images", disable=quiet or not order):
        content = content_of(records, index)
        found[index] = None if content is None else digest(content)
    return found


def _of_files(paths: list[str], lockfile: Path, quiet: bool) -> dict[str, bytes]:
    before = _read(lockfile)
    with ThreadPoolExecutor(_THREADS) as threads:
        stamps = dict(zip(paths, threads.map(stamp_of, paths, chunksize=256), strict=True))
        found = {path: before[path][1] for path in paths if path in before and before[path][0] == stamps[path] != ""}
        new = [path for path in paths if path not in found and stamps[path]]
        if not new:
            return found
        lockfile.parent.mkdir(parents=True, exist_ok=True)
        with lockfile.open("a", encoding="utf-8") as lines:
            lines.write("\n")  # behind a line that an earlier look left half written
            for start in track(range(0, len(new), _AT_ONCE), description="hashing pictures", disable=quiet):
                some = new[start : start + _AT_ONCE]
                for path, own in zip(some, threads.map(_hash, some), strict=True):
                    if own is not None:
                        found[path] = own
                        lines.write(json.dumps([path, stamps[path], own.hex()]) + "\n")
                lines.flush()
    return found


def _hash(path: str) -> bytes | None:
    try:
        return digest(Path(path).read_bytes())
    except OSError:
        return None


def _read(lockfile: Path) -> dict[str, tuple[str, bytes]]:
    if not lockfile.is_file():
        return {}
    found = {}
    for line in lockfile.read_text(encoding="utf-8").split("\n"):
        try:
            path, stamp, own = json.loads(line)
            found[path] = (stamp, bytes.fromhex(own))
        except (ValueError, TypeError):
            continue  # empty, or half written when the machine stopped
    return found
