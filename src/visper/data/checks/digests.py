"""Images by their content: the same bytes are the same image, whatever the file's name, place or date.

What was hashed is kept line by line, so that an interrupted look goes on where it stopped and a second one takes
seconds. A file that has changed since is hashed again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from visper.common.console import track
from visper.common.errors import DataError
from visper.common.files import inside
from visper.data.checks.image_files import stamp_of
from visper.data.rows.records import Record
from visper.data.rows.table import Records

DIGEST_BYTES = 16
LOCKFILE = "digests.jsonl"
_THREADS, _AT_ONCE = 16, 512


def digest(content: bytes) -> bytes:
    """The first 16 bytes of a content's SHA-256."""
    return hashlib.sha256(content).digest()[:DIGEST_BYTES]


def image_id(content: bytes) -> int:
    """A number of 64 bits that equal contents share and, but for a chance of about 1e-13 in a batch, no others."""
    return int.from_bytes(digest(content)[:8], "little", signed=True)


def contents_of(records: Sequence[Record], index: int) -> list[bytes | None]:
    """The bytes of a row's images, from its source or their files; None for one that has no such file.

    Raises:
        DataError: a file does not lie in its source's folder of images, or the source does not hold every image.
    """
    if not isinstance(records, Records):
        return [_read_file(Path(image.path)) for image in records[index].images]
    part, row = records.place(index)
    images = part.table.images(row)
    if part.images is not None:
        return [_read_file(inside(part.images, image.path)) for image in images]
    held = part.embedded(row) if part.embedded is not None and images else []
    if len(held) != len(images):
        raise DataError("image not embedded", f"the source holds {len(held)} of the row's {len(images)} images")
    return list(held)


def _read_file(path: Path) -> bytes | None:
    try:
        return path.read_bytes() if path.is_file() else None
    except OSError:
        return None


def digests_of(records: Records, quiet: bool = True) -> dict[tuple[int, int], bytes | None]:
    """The digest of every image by its row and its number there, in this order; None where there is no such file."""
    files = {(index, number): (folder, name) for index, number, folder, name in records.image_files()}
    lockfile = records.parts[0].table.path.parent / LOCKFILE
    of_file = _of_files(list(dict.fromkeys(files.values())), lockfile, quiet)
    found = {place: of_file.get(str(folder / name)) for place, (folder, name) in files.items()}
    embedded = [i for i, has in enumerate(records.has_image.tolist()) if has and (i, 0) not in files]
    # In the order of the files, which read rows in groups.
    order = sorted(embedded, key=lambda index: int(records.rows[index]))
    for index in track(order, description="hashing embedded images", quiet=quiet or not order):
        try:
            contents = contents_of(records, index)
        except DataError:
            continue  # training leaves the row out
        found |= {(index, number): digest(held) for number, held in enumerate(contents) if held is not None}
    return dict(sorted(found.items()))


def _of_files(places: list[tuple[Path, str]], lockfile: Path, quiet: bool) -> dict[str, bytes]:
    before = _read(lockfile)
    with ThreadPoolExecutor(_THREADS) as threads:
        paths = [str(folder / name) for folder, name in places]
        stamps = dict(zip(paths, threads.map(_stamp, places), strict=True))
        found = {path: before[path][1] for path in paths if path in before and before[path][0] == stamps[path] != ""}
        new = [path for path in paths if path not in found and stamps[path]]
        if not new:
            return found
        lockfile.parent.mkdir(parents=True, exist_ok=True)
        with lockfile.open("a", encoding="utf-8") as lines:
            lines.write("\n")  # behind a line that an earlier look left half written
            for start in track(range(0, len(new), _AT_ONCE), description="hashing images", quiet=quiet):
                some = new[start : start + _AT_ONCE]
                for path, own in zip(some, threads.map(_hash, some), strict=True):
                    if own is not None:
                        found[path] = own
                        lines.write(json.dumps([path, stamps[path], own.hex()]) + "\n")
                lines.flush()
    return found


def _stamp(place: tuple[Path, str]) -> str:
    try:
        return stamp_of(str(inside(*place)))
    except DataError:
        return ""


def _hash(path: str) -> bytes | None:
    content = _read_file(Path(path))
    return None if content is None else digest(content)


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
