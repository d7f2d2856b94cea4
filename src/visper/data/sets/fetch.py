"""Downloads one file over HTTP: continued after an interruption, retried, verified against known sizes and hashes.

The hub's client is used only to list files, sizes and hashes; the files are downloaded here, since that client (2.4)
discards interrupted downloads. A partial file is continued only if the server confirms that the file is the same
(If-Range with its strong ETag or date), or if a published hash will verify the result.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
from urllib3 import Retry
from urllib3.exceptions import HTTPError, MaxRetryError

from visper.common.errors import DataError
from visper.common.files import write_text
from visper.data.sets.archives import content_fault
from visper.data.sets.background import ProgressBar, in_background, require_room
from visper.data.sets.lockfile import Entry, Lockfile

CHUNK = 1 << 20
PIECE = 1 << 16
"""Bytes read from a connection at once; when it breaks, up to this many received bytes are lost."""
FOUND = "found in place"
"""The recorded source of a file that a user put in place."""
_PASSING = (408, 425, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class RetryPolicy:
    """How long to wait for a server, in seconds; the pause doubles with each attempt that gains no bytes.

    ``timeout`` limits the connection, all headers together, and each piece of the body.
    """

    attempts: int = 6
    timeout: float = 60.0
    pause: float = 2.0
    longest_pause: float = 600.0

    def retries(self) -> Retry:
        """The attempts after the first one."""
        return Retry(self.attempts - 1, backoff_factor=self.pause, backoff_max=self.longest_pause)


@dataclass(frozen=True)
class Remote:
    """A file at a URL or on this machine (``local``), with its published size and hashes."""

    name: str
    source: str
    url: str = ""
    local: Path | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    bytes: int | None = None
    sha256: str | None = None
    md5: str | None = None

    @property
    def hash_is_published(self) -> bool:
        """Whether a published hash can verify the download."""
        return self.sha256 is not None or self.md5 is not None


class SourceError(Exception):
    """This source does not provide the file; another one may."""


class _PassingError(Exception):
    """The same request may succeed later."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(without_queries(reason))
        self.wait = wait


def without_queries(text: str) -> str:
    """A text with the query strings of URLs removed, since those of presigned URLs are secrets."""
    return re.sub(r"\?[^\s'\")>]*=[^\s'\")>]*", "", text)


def obtain(
    remote: Remote,
    place: Path,
    part: Path,
    archive: bool,
    lockfile: Lockfile,
    meter: ProgressBar,
    patience: RetryPolicy,
) -> Entry:
    """Fetches a file to ``place`` if it is absent, and verifies it against its published and recorded identity.

    Args:
        part: the partial download, which is continued.
        archive: whether the file must be a zip or tar.

    Raises:
        SourceError: the source does not provide the file, or provides another one.
        DataError: the file at ``place`` is another one, or the disk is full.
    """
    known = lockfile.entry(remote.name, remote.source)
    if place.is_file():
        found = _accept(remote, place, archive, lockfile, meter)
        _discard(part)
        return found
    for attempt in (1, 2):
        fetch(remote, part, meter, patience)
        try:
            found = _verified(remote, part, archive, known, meter)
        except SourceError as error:
            _discard(part)
            if attempt == 2:
                raise
            meter.say(f"{error}; fetching it again from the start")
            continue
        # Recorded before it is moved: after a kill in between, the finished part is verified and moved.
        lockfile.record(remote.name, remote.source, found)
        place.parent.mkdir(parents=True, exist_ok=True)
        part.replace(place)
        _state_of(part).unlink(missing_ok=True)
        return found
    raise AssertionError("the second attempt returns or raises")


def _accept(remote: Remote, place: Path, archive: bool, lockfile: Lockfile, meter: ProgressBar) -> Entry:
    """Accepts a file that is already in place by its published hash, or else by its recorded size."""
    known = lockfile.recorded(remote.name)
    size = place.stat().st_size
    try:
        if not remote.hash_is_published:
            for entry in known:
                if entry.bytes == size:
                    return entry
            if known:
                raise SourceError(f"it has {size} bytes, recorded were {known[0].bytes}")
        found = _verified(remote, place, archive, None, meter)
    except SourceError as error:
        raise DataError("unexpected file", f"'{place}': {error}. Move it away to have it fetched again") from error
    if found not in known:
        lockfile.record(remote.name, FOUND, found)
    return found


def _verified(remote: Remote, path: Path, archive: bool, known: Entry | None, meter: ProgressBar) -> Entry:
    size = path.stat().st_size
    if remote.bytes is not None and size != remote.bytes:
        raise SourceError(f"it has {size} bytes, expected {remote.bytes}")
    fault = content_fault(path, archive, remote.name)
    if fault is not None:
        raise SourceError(fault)
    hashes = {"sha256": hashlib.sha256()}
    if remote.md5 is not None:
        hashes["md5"] = hashlib.md5(usedforsecurity=False)
    meter.show("verifying", 0, size)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            for running in hashes.values():
                running.update(chunk)
            meter.advance(len(chunk))
    sha256 = hashes["sha256"].hexdigest()
    for kind, expected in (("sha256", remote.sha256), ("md5", remote.md5)):
        if expected is not None and hashes[kind].hexdigest() != expected:
            raise SourceError(f"its {kind} is {hashes[kind].hexdigest()}, but the published one is {expected}")
    if known is not None and known.sha256 != sha256:
        raise SourceError(
            f"its sha256 is {sha256}, but {known.sha256} was recorded at the first download: the file at this address "
            "has changed. To trust the new one, remove its entry from visper-data.lock.json"
        )
    return Entry(size, sha256)


def fetch(remote: Remote, part: Path, meter: ProgressBar, patience: RetryPolicy) -> None:
    """Downloads the remote file to ``part``, reconnecting as long as bytes are gained.

    Raises:
        SourceError: the server refuses, or ``patience.attempts`` attempts in a row gain no bytes.
        DataError: the disk is full.
    """
    furthest, retries = _size(part), patience.retries()
    while True:
        try:
            _continue(remote, part, meter, patience)
            return
        except (requests.RequestException, HTTPError, TimeoutError, zlib.error) as error:
            passing = _PassingError(f"{type(error).__name__}: {error}"[:300])
        except _PassingError as error:
            passing = error
        gained = _size(part) > furthest
        furthest = max(furthest, _size(part))
        try:
            retries = patience.retries() if gained else retries.increment(error=passing)
        except MaxRetryError as error:
            raise SourceError(f"gave up after {patience.attempts} failed attempts: {passing}") from error
        wait = min(patience.longest_pause, passing.wait or max(patience.pause, retries.get_backoff_time()))
        meter.say(f"{passing}; retrying in {wait:g} s, {_size(part)} bytes are kept")
        if meter.stop.wait(wait):
            raise KeyboardInterrupt


def _answer(url: str, headers: Mapping[str, str], timeout: float) -> Iterator[requests.Response | bytes]:
    """The reply to a request, then its body in pieces."""
    with requests.get(url, headers=dict(headers), stream=True, timeout=timeout) as reply:
        yield reply
        yield from _decoded(reply.raw.stream(PIECE, decode_content=False), reply.headers.get("Content-Encoding"))


def _decoded(pieces: Iterator[bytes], encoding: str | None) -> Iterator[bytes]:
    """The body, decompressed to its verified end if the server compressed it: requests accepts a truncated one."""
    if encoding is None:
        yield from pieces
        return
    if encoding != "gzip":
        raise _PassingError(f"the body is encoded as {encoding!r}, which was not requested")
    decoder = zlib.decompressobj(16 + zlib.MAX_WBITS)
    yield from map(decoder.decompress, pieces)
    if not decoder.eof or decoder.unused_data:
        raise _PassingError("the compressed body is truncated or has data after its end")


def _continue(remote: Remote, part: Path, meter: ProgressBar, patience: RetryPolicy) -> None:
    """One request, for the rest of the partial file or for the complete file."""
    state, offset = _read_state(part), _size(part)
    same = state.get("source") == remote.source
    validator = state.get("validator") if same else None
    total = remote.bytes or (state.get("total") if same else None)
    if offset and offset == total and (validator or remote.hash_is_published):
        return
    headers = {"Accept-Encoding": "identity", **remote.headers}
    if offset and (validator or remote.hash_is_published):
        headers["Range"] = f"bytes={offset}-"
        if validator:
            headers["If-Range"] = str(validator)
    received = in_background(_answer(remote.url, headers, patience.timeout), meter.stop, 2 * patience.timeout)
    with closing(received):
        reply = next(received)
        assert isinstance(reply, requests.Response)
        if reply.status_code == 416 and offset:
            _discard(part)
            raise _PassingError(f"the server has no bytes from {offset} on: starting again", 0.001)
        _refuse_bad(reply)
        if reply.status_code == 206:
            total = _check_range(reply, offset, state, remote, part)
        else:
            offset, total = 0, _length(reply)
            _refuse_size(remote, total)
            _refuse_endless(remote, reply)
            part.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(b"")  # emptied before its new state is written, in case of a kill in between
        _refuse_size(remote, total)
        new = {
            "source": remote.source,
            "validator": _validator(reply),
            "total": total,
            "etag": reply.headers.get("ETag"),
        }
        if new != state:
            write_text(_state_of(part), json.dumps(new, sort_keys=True))
        require_room(part.parent, (total or offset) - offset, remote.name)
        meter.show("fetching", offset, total)
        _write(received, part, total or remote.bytes, meter)
    if total is not None and _size(part) != total:
        raise _PassingError(f"received {_size(part)} of {total} bytes")


def _write(received: Iterator[requests.Response | bytes], part: Path, most: int | None, meter: ProgressBar) -> None:
    """Appends the body to the part; checks free disk space and the announced number of bytes."""
    with part.open("ab") as file:
        for chunk in received:
            assert isinstance(chunk, bytes)
            require_room(part.parent, len(chunk), part.name)
            if most is not None and file.tell() + len(chunk) > most:
                _discard(part)
                raise _PassingError(f"received more than the announced {most} bytes")
            file.write(chunk)
            meter.advance(len(chunk))


def _refuse_bad(reply: requests.Response) -> None:
    status = reply.status_code
    if status in _PASSING:
        raise _PassingError(f"HTTP {status} {reply.reason}", _retry_after(reply))
    if status in (401, 403):
        raise SourceError(f"HTTP {status} {reply.reason}: not allowed; a hub data set may need `hf auth login`")
    if status not in (200, 206):
        raise SourceError(f"HTTP {status} {reply.reason}")


def _refuse_size(remote: Remote, total: int | None) -> None:
    if None not in (remote.bytes, total) and total != remote.bytes:
        raise SourceError(f"the server offers {total} bytes, but the published size is {remote.bytes}")


def _refuse_endless(remote: Remote, reply: requests.Response) -> None:
    """Refuses a body without a length unless a size or hash is published: it may be truncated unnoticed."""
    measured = _number(reply.headers.get("Content-Length")) is not None
    chunked = reply.headers.get("Transfer-Encoding", "").lower() == "chunked"
    if not measured and not chunked and remote.bytes is None and not remote.hash_is_published:
        raise SourceError("the server sends no length: give 'bytes' or 'sha256' in the set's description")


def _check_range(reply: requests.Response, offset: int, state: Mapping[str, Any], remote: Remote, part: Path) -> int:
    """The file's length; raises unless the response extends to the file's end and belongs to the partial file."""
    span = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", reply.headers.get("Content-Range", ""), re.ASCII)
    start, end, total = map(int, span.groups()) if span else (-1, -1, -1)
    found, etag = _validator(reply), reply.headers.get("ETag")
    same = state.get("source") == remote.source
    changed = same and (
        (found is not None and state.get("validator") not in (None, found))
        or state.get("etag") not in (None, etag)  # also a weak one
        or state.get("total") not in (None, total)
    )
    if start != offset or end != total - 1 or changed or "Content-Encoding" in reply.headers:
        _discard(part)
        raise _PassingError("the server's file changed or it sent another range than requested: starting again", 0.001)
    return total


def _validator(reply: requests.Response) -> str | None:
    if "Content-Encoding" in reply.headers:  # its bytes are not the file's
        return None
    etag = reply.headers.get("ETag")
    return etag if etag and not etag.startswith("W/") else reply.headers.get("Last-Modified")


def _length(reply: requests.Response) -> int | None:
    return None if "Content-Encoding" in reply.headers else _number(reply.headers.get("Content-Length"))


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and re.fullmatch(r"\d{1,18}", text, re.ASCII) else None


def _retry_after(reply: requests.Response) -> float | None:
    """The seconds that the server asks to wait; None without a valid header."""
    value = reply.headers.get("Retry-After", "")
    try:
        return Retry().parse_retry_after(value)
    except (HTTPError, ValueError, OverflowError, TypeError):
        return None


def _state_of(part: Path) -> Path:
    return part.with_name(f"{part.name}.state.json")


def _read_state(part: Path) -> dict[str, Any]:
    try:
        state = json.loads(_state_of(part).read_bytes())
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _state_of(part).unlink(missing_ok=True)


def _size(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0
