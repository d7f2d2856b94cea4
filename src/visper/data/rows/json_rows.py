"""Reads rows from JSON files in UTF-8, UTF-16 or UTF-32, with or without a BOM, gzipped or not.

A file contains a list of rows, or one row per line; this is decided by content, not by name. Lines are read one at a
time. A list is decoded row by row from the file's text, so memory holds that text and one row: a fifth of what
``json.load`` takes. Bytes that are not UTF-8 make their row bad, not the file.
"""

from __future__ import annotations

import gzip
import json
import mmap
import re
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from visper.common.errors import DataError, kind_of
from visper.common.files import place_of

_GZIP = b"\x1f\x8b"
_OTHER_FORMATS = {
    b"PAR1": "a Parquet file: name it as {parquet: PATH}",
    b"ARROW1": "an Arrow file: name its folder as {hf: FOLDER}",
    b"PK\x03\x04": "a zip archive: unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: decompress it, or use gzip",
    b"BZh": "compressed by bzip2: decompress it, or use gzip",
    b"\xfd7zXZ": "compressed by xz: decompress it, or use gzip",
    b"version https://git-lfs": "a Git LFS pointer: fetch the file itself (`git lfs pull`)",
    b"<": "an HTML or XML page: download the file again",
}
CONVERSATIONS = {"conversations", "messages", "texts"}
"""Keys of a row that hold a conversation, one for each format."""
_SHOWN_KEYS = 8
_space = re.compile(r"[ \t\n\r]*").match
_LONGEST_NUMBER = 4000  # digits; Python refuses to parse integers of more than 4300


def _integer(digits: str) -> int | str:
    return int(digits) if len(digits) <= _LONGEST_NUMBER else digits


_decode = json.JSONDecoder(parse_int=_integer).raw_decode


def is_json_name(name: str) -> bool:
    """Whether a file name ends with ``.json`` or ``.jsonl``, optionally followed by ``.gz``."""
    return name.removesuffix(".gz").endswith((".json", ".jsonl"))


def read_rows(file: Path) -> Iterator[Any]:
    """The values of a JSON list or of a file's lines; a line that is not JSON is returned as text.

    Raises:
        DataError: the file is missing, of another format, damaged, or not a list; the message says which.
    """
    try:
        yield from _rows(file)
    except FileNotFoundError as error:
        raise DataError("no such file", f"{place_of(file)}: expected rows (.json or .jsonl); check the path") from error
    except (EOFError, zlib.error, OSError) as error:
        raise DataError("unreadable file", f"'{file}': {error}; is it complete? Download it again") from error
    except RecursionError as error:
        raise DataError("not JSON", f"'{file}': values are nested too deeply") from error
    except DataError:
        raise
    except ValueError as error:  # JSON's own, or an undecodable text
        raise DataError("not JSON", f"'{file}': {error}; download it again, or convert it to UTF-8 JSON") from error


def _rows(file: Path) -> Iterator[Any]:
    with file.open("rb") as raw:
        zipped = raw.read(2) == _GZIP
    with gzip.open(file) if zipped else file.open("rb") as content:
        start = content.read(64)
        for magic, what in _OTHER_FORMATS.items():
            if start.startswith(magic):
                raise DataError("not JSON", f"'{file}' is {what}")
        content.seek(0)
        encoding = json.detect_encoding(start)
        by_line = file.name.removesuffix(".gz").endswith(".jsonl")
        if by_line or not str(start, encoding, "ignore").lstrip().startswith("["):
            lines = filter(None, map(str.strip, _lines(content, encoding)))
            first, second = next(lines, ""), next(lines, "")
            if not first:
                raise ValueError("the file is empty")
            if _is_row_a_line(first, second, by_line):
                yield from map(_line, chain([first], [second] if second else [], lines))
                return
            content.seek(0)
        text = _whole(content, encoding)
        at = _skip(text, 0)
        yield from _list(text, at + 1) if text.startswith("[", at) else _objects(text, at, file)


def _is_row_a_line(first: str, second: str, by_line: bool) -> bool:
    """Decides by the first two lines; ``by_line``: whether the name ends with .jsonl."""
    if re.match(r"\[\s*(\{|$)", first):  # a list, on one line or several
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return by_line and first != "{"  # a broken line, not the first one of an indented object
    return by_line or bool(second)


def _line(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return line


def _list(text: str, at: int) -> Iterator[Any]:
    """The entries of the list whose opening bracket is just before ``at``."""
    mark = "]" if text.startswith("]", _skip(text, at)) else ","
    at = _skip(text, at) + (mark == "]")
    while mark == ",":
        value, at = _decode(text, _skip(text, at))
        yield value
        at = _skip(text, at)
        mark = text[at : at + 1]
        if mark not in (",", "]"):
            raise ValueError(f"expected ',' or ']' at character {at}, found {mark or 'the end of the file'!r}")
        at += 1
    if _skip(text, at) < len(text):
        raise ValueError(f"found text after the list, at character {_skip(text, at)}")


def _objects(text: str, at: int, file: Path) -> Iterator[Any]:
    """Concatenated objects; a single object is refused."""
    value, at = _decode(text, at)
    if _skip(text, at) == len(text):
        what = f"'{file}' contains {_only(value)}"
        raise DataError("not a list of rows", f"{what}: expected a list of rows, or one row per line{_remedy(value)}")
    yield value
    while (at := _skip(text, at)) < len(text):
        value, at = _decode(text, at)
        yield value


def _only(value: Any) -> str:
    if not isinstance(value, dict):
        return f"only {kind_of(value)}"
    keys = ", ".join(repr(str(key)) for key in list(value)[:_SHOWN_KEYS])
    return f"one object with the keys {keys}" + (", ..." if len(value) > _SHOWN_KEYS else "")


def _remedy(value: Any) -> str:
    """What to do with a value that contains rows, or is one."""
    if isinstance(value, str):
        return ". If the text is itself JSON, the file was encoded twice: write the text instead"
    if not isinstance(value, dict):
        return "; check that this is the file of the rows"
    lists = [key for key, inner in value.items() if isinstance(inner, list) and inner and isinstance(inner[0], dict)]
    if lists and not CONVERSATIONS & value.keys():
        return f". If the rows are the list under {lists[0]!r}, write only this list to a file"
    if value and all(isinstance(inner, dict) for inner in value.values()):
        return ". If its values are the rows, write them as a list, without the keys"
    return ". If it is one row, put it in brackets, [{...}]"


def _skip(text: str, at: int) -> int:
    match = _space(text, at)
    assert match is not None
    return match.end()


def _whole(content: Any, encoding: str) -> str:
    if isinstance(content, gzip.GzipFile):
        return _text(content.read(), encoding)
    with mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ) as mapped:  # avoids a second copy in memory
        return _text(mapped, encoding)


def _lines(content: Any, encoding: str) -> Iterator[str]:
    if encoding.startswith("utf-8"):
        for number, line in enumerate(content):
            yield _text(line, encoding if number == 0 else "utf-8")
    else:
        yield from _text(content.read(), encoding).split("\n")


def _text(content: Any, encoding: str) -> str:
    """``content`` decoded. Bytes that are not UTF-8 become lone surrogates, which make only their row bad."""
    try:
        return str(content, encoding, "surrogatepass")
    except UnicodeDecodeError:
        if not encoding.startswith("utf-8"):
            raise
        return str(content, encoding, "surrogateescape")
