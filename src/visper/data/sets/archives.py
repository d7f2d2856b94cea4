"""Reads archives, and checks their members' names and target paths before anything is written.

Zip and tar files, zips inside zips, and plain folders have one interface. An archive with a name that leads outside, a
link or a device is refused as a whole: published ones contain none of these.
"""

from __future__ import annotations

import errno
import fnmatch
import posixpath
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from lzma import LZMAError
from pathlib import Path
from typing import IO

from visper.common.errors import DataError

POINTER = b"version https://git-lfs.github.com/spec/"
CHUNK = 1 << 20
_DAMAGE = (zipfile.BadZipFile, tarfile.TarError, zlib.error, LZMAError, EOFError, struct.error,
           ValueError, NotImplementedError, RuntimeError, OverflowError)  # fmt: skip
"""What zipfile, tarfile and the decompressors raise for damaged bytes, besides an OSError without errno."""


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file of an archive: its name there, its size, and the inner archive that contains it ('' = none)."""

    name: str
    size: int
    inner: str = ""


def relative_path(name: str) -> str:
    """A relative path in its shortest form ('' = the folder itself).

    Checks only the text, before the folder is known; ``common.files.inside`` checks the actual place.

    Raises:
        DataError: it is absolute, leads outside, or is not a valid name on common file systems.
    """
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if (
        name.startswith("/")
        or ".." in parts
        or re.match(r"[A-Za-z]:", "/".join(parts))
        or re.search(r"[\\\x00-\x1f\x7f\ud800-\udfff]", name)
        or any(len(part.encode()) > 255 for part in parts)
        or len(name.encode(errors="replace")) > 2000
    ):
        raise DataError("unsafe name", f"{name[:200]!r}: expected a plain path that stays inside its folder")
    return "/".join(parts)


def list_members(path: Path, inner: Sequence[str] = ()) -> list[Member]:
    """The regular files of an archive or a folder, and of the archives ``inner`` inside it.

    A damaged archive never silently yields fewer members: a tar is read to its end-of-archive blocks and to the
    verified end of its compressed stream, and each name in a zip's directory is compared with the member's own header.

    Raises:
        DataError: 'broken archive' if it cannot be read, 'unsafe archive' if a member is a link or a device.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return [Member(file.relative_to(path).as_posix(), file.stat().st_size) for file in files]
    with _reading(path), ExitStack() as stack:
        if not _is_zip(path):
            tar = stack.enter_context(tarfile.open(path))
            members = [Member(entry.name, entry.size) for entry in tar if not _skipped_in_tar(entry, path)]
            _check_end(tar)
            return members
        outer = stack.enter_context(zipfile.ZipFile(path))
        members = [Member(entry.filename, entry.file_size) for entry in _zip_files(outer, path)]
        for name in inner:
            archive = stack.enter_context(zipfile.ZipFile(stack.enter_context(_open_inner(outer, name, path))))
            members += [Member(entry.filename, entry.file_size, name) for entry in _zip_files(archive, path)]
        return members


def read_members(path: Path, wanted: Collection[Member]) -> Iterator[tuple[Member, IO[bytes]]]:
    """Opens the wanted members one after the other, in the archive's own order, to read the disk in one pass.

    Raises:
        DataError: 'broken archive'. Damage is found while a member is read, a wrong checksum at its end, so read the
            streams with ``read_chunks``.
    """
    if path.is_dir():
        for member in wanted:
            with (path / member.name).open("rb") as stream:
                yield member, stream
        return
    with _reading(path), ExitStack() as stack:
        if not _is_zip(path):
            names = {member.name: member for member in wanted}
            tar = stack.enter_context(tarfile.open(path))
            for entry in tar:
                content = tar.extractfile(entry) if entry.isfile() and entry.name in names else None
                if content is not None:
                    with content:
                        yield names[entry.name], content
            return
        outer = stack.enter_context(zipfile.ZipFile(path))
        for name in sorted({member.inner for member in wanted}):
            archive = outer
            if name:
                archive = stack.enter_context(zipfile.ZipFile(stack.enter_context(_open_inner(outer, name, path))))
            here = [member for member in wanted if member.inner == name]
            for member in sorted(here, key=lambda member: archive.getinfo(member.name).header_offset):
                with archive.open(member.name) as stream:
                    yield member, stream


def read_chunks(stream: IO[bytes], path: Path) -> Iterator[bytes]:
    """The bytes of a member of the archive at ``path``.

    Raises:
        DataError: 'broken archive'.
    """
    with _reading(path):
        while chunk := stream.read(CHUNK):
            yield chunk


def target_paths(
    members: Collection[Member],
    to: str,
    inside: str = "",
    only: Sequence[str] = (),
    flat: bool = False,
    extension: str | None = None,
    inner: str | None = None,
) -> dict[str, Member]:
    """The members by their target paths under the root; see ``catalog.Unpack`` for the arguments.

    Raises:
        DataError: a name leads outside, no member matches, or two members have the same target.
    """
    checked = [(relative_path(member.name), member) for member in members if member.inner == (inner or "")]
    nameless = next((member.name for name, member in checked if not name), None)
    if nameless is not None:
        raise DataError("unsafe name", f"{nameless!r} is not the name of a file")
    found: dict[str, Member] = {}
    for name, member in checked:
        if inside and not name.startswith(f"{inside}/"):
            continue
        tail = name[len(inside) + 1 :] if inside else name
        if _is_junk(tail) or (only and not any(fnmatch.fnmatchcase(tail, pattern) for pattern in only)):
            continue
        tail = posixpath.basename(tail) if flat else tail
        renamed = posixpath.splitext(tail)[0] + extension if extension else tail
        place = posixpath.join(to, renamed)
        if place not in found or (extension and tail == renamed):
            found[place] = member
        elif not extension:
            raise DataError("unsafe archive", f"{found[place].name!r} and {member.name!r} would both become '{place}'")
    if not found:
        folders = sorted({name.split("/")[0] for name, _ in checked})[:5]
        looked = f"'{inside}/'" if inside else "files"
        raise DataError("unexpected layout", f"no {looked}{f' like {only}' if only else ''} inside; found {folders}")
    clash = next((p for place in found for p in _parents(place) if p in found), None)
    if clash is not None:
        raise DataError("unsafe archive", f"'{clash}' would be a file and a folder")
    return found


def _parents(place: str) -> Iterator[str]:
    while "/" in place:
        place = place.rpartition("/")[0]
        yield place


def _is_junk(name: str) -> bool:
    parts = name.split("/")
    return "__MACOSX" in parts or parts[-1] == ".DS_Store" or parts[-1].startswith("._")


def _is_zip(path: Path) -> bool:
    """Whether the file begins like a zip. Its end is not a criterion: a tar may end with a zip."""
    with path.open("rb") as file:
        return file.read(4) in (b"PK\x03\x04", b"PK\x05\x06")


def _is_tar(path: Path) -> bool:
    try:
        with _reading(path):
            return tarfile.is_tarfile(path)
    except DataError:  # a truncated compressed file
        return False


def _check_end(tar: tarfile.TarFile) -> None:
    """Reads the archive's end after the last member: tarfile takes a damaged header for the end.

    Raises:
        ReadError: the two zero blocks at the end are missing, or data follows them.
        EOFError, OSError: the compressed stream is truncated, or its checksum is wrong.
    """
    stream = tar.fileobj
    assert stream is not None
    stream.seek(tar.offset)
    if stream.read(2 * tarfile.BLOCKSIZE) != bytes(2 * tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"damaged after {len(tar.getmembers())} members: no end-of-archive blocks there")
    while chunk := stream.read(CHUNK):
        if chunk.strip(b"\0"):
            raise tarfile.ReadError("more data follows its end-of-archive blocks")


def _zip_files(archive: zipfile.ZipFile, path: Path) -> Iterator[zipfile.ZipInfo]:
    for entry in sorted(archive.infolist(), key=lambda entry: entry.header_offset):
        if not entry.filename:  # zipfile fails on it
            raise DataError("unsafe archive", f"'{path}': a member has no name")
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if entry.is_dir():
            continue
        if kind not in (0, stat.S_IFREG):
            raise DataError(
                "unsafe archive", f"'{path}': {entry.filename!r} is a link or a device, expected files only"
            )
        if entry.flag_bits & 1:
            raise DataError("broken archive", f"'{path}': {entry.filename!r} is encrypted")
        if b"PK\x01\x02" in entry.comment + entry.extra:
            raise DataError("broken archive", f"'{path}': the entry of {entry.filename!r} contains further entries")
        archive.open(entry).close()  # compares the name in the directory with that in the member's header
        yield entry


def _skipped_in_tar(entry: tarfile.TarInfo, path: Path) -> bool:
    if not (entry.isfile() or entry.isdir()):
        raise DataError("unsafe archive", f"'{path}': {entry.name!r} is a link or a device, expected files only")
    try:
        tarfile.data_filter(entry, "/nowhere")
    except tarfile.FilterError as error:
        raise DataError("unsafe name", f"'{path}': {error}") from error
    return entry.isdir()


def _open_inner(outer: zipfile.ZipFile, name: str, path: Path) -> IO[bytes]:
    if name not in outer.NameToInfo:
        near = [entry for entry in outer.namelist() if entry.endswith(".zip")][:5]
        raise DataError("unexpected layout", f"'{path}' does not contain '{name}'; archives inside it: {near}")
    return outer.open(name)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns exceptions for damaged bytes into a DataError; errors of the disk keep their type."""
    try:
        yield
    except DataError:
        raise
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):
            raise
        # gzip and bz2 set no errno; a wrong offset in a zip gives EINVAL.
        raise DataError("broken archive", f"'{path}': {error}") from error
    except _DAMAGE as error:
        raise DataError("broken archive", f"'{path}': {error or type(error).__name__}") from error


def content_fault(path: Path, archive: bool, name: str) -> str | None:
    """Why the content of a new file cannot match its name; None if it may.

    Servers may send an error page with status 200, and a repository cloned without git-lfs contains pointers.
    """
    with path.open("rb") as file:
        head = file.read(512)
        file.seek(-min(64, path.stat().st_size), 2)
        tail = file.read().rstrip()
    if head.startswith(POINTER):
        return "a git-LFS pointer, not the file itself (a clone needs `git lfs pull`)"
    if head.lstrip()[:1] == b"<" and Path(name).suffix in (".zip", ".tar", ".json", ".jsonl", ".gz", ".parquet"):
        return f"a web page, not {Path(name).suffix}: it starts with {head[:40]!r}"
    if Path(name).suffix == ".json" and not (head.lstrip()[:1] in (b"[", b"{") and tail[-1:] in (b"]", b"}")):
        return f"not JSON (truncated or damaged): it starts with {head[:16]!r} and ends with {tail[-16:]!r}"
    if re.match(rb"\s*<(!doctype )?html", head, re.IGNORECASE) and Path(name).suffix not in (".html", ".htm"):
        return f"a web page: it starts with {head[:40]!r}"
    if Path(name).suffix == ".json" and re.match(rb'\s*\{\s*"(error|message)"', head) and path.stat().st_size < 4096:
        return f"an error message: {head[:80]!r}"
    if Path(name).suffix == ".parquet" and not (head[:4] == tail[-4:] == b"PAR1"):
        return f"not Parquet (truncated or damaged): it starts with {head[:16]!r}"
    if archive and not (_is_zip(path) or _is_tar(path)):
        return f"not a zip or tar archive (truncated or damaged): it starts with {head[:16]!r}"
    return None
