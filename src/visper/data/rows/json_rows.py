"""The rows of a conversation file, one at a time: memory holds one row and a megabyte, whatever the file's size.

The rows are those of ``json.load``, to the last escape: the standard library's own decoder reads them, from a window
that moves over the file. ijson, the usual choice, does not give them: its C reader (3.6, yajl2) turns half a surrogate
pair into a question mark, so that a row which no tokenizer can read would pass, and gives up the whole file at a long
integer or at two halves in one text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

CHUNK = 1 << 20  # characters read at once
LONGEST_ROW = 1 << 26  # characters; published rows have at most some 100,000
_LONGEST_TOKEN = 16  # what a value, escape or literal cut by the window's end may lack
_SPACE = re.compile(r"[ \t\n\r]*")
_decode = json.JSONDecoder().raw_decode


def read_rows(file: Path) -> Iterator[Any]:
    """The values of a JSON list, or of the lines of a ``.jsonl`` file; a line that is no JSON is given as text.

    Raises:
        ValueError: the file is no JSON, or no list; the message says where.
    """
    if file.suffix == ".jsonl":
        with file.open(encoding="utf-8") as lines:
            yield from (_line(line) for line in lines if line.strip())
        return
    with file.open("rb") as head:
        encoding = json.detect_encoding(head.read(4))
    with file.open(encoding=encoding, errors="surrogatepass", newline="") as stream:
        yield from _listed(_Window(stream))


def _line(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return line


def _listed(window: _Window) -> Iterator[Any]:
    if window.peek() != "[":
        value = window.value() if window.peek() != "{" else {}
        raise NotAListError(f"holds {type(value).__name__}: expected a list of conversations")
    window.at += 1
    if window.peek() == "]":
        window.at += 1
    else:
        yield window.value()
        while (mark := window.peek()) == ",":
            window.at += 1
            window.peek()
            yield window.value()
        if mark != "]":
            found = mark or "the end of the file"
            raise ValueError(f"expected ',' or ']' at character {window.place}, found {found!r}")
        window.at += 1
    if window.peek():
        raise ValueError(f"text goes on behind the list, at character {window.place}")


class NotAListError(ValueError):
    """JSON of another shape than a list."""


class _Window:
    """The part of a text that is being decoded."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.text = ""
        self.at = 0
        self._before = 0  # characters that the window has left behind

    @property
    def place(self) -> int:
        """Characters of the file up to here."""
        return self._before + self.at

    def more(self) -> bool:
        """Reads on, and forgets what is behind; False at the end of the file."""
        # As much again as is held: a row that needs many reads is decoded again over at most twice its length.
        new = self.stream.read(max(CHUNK, len(self.text) - self.at))
        if not new:
            return False
        self._before += self.at
        self.text, self.at = self.text[self.at :] + new, 0
        return True

    def peek(self) -> str:
        """The next character that is no white space; empty at the end of the file."""
        while True:
            match = _SPACE.match(self.text, self.at)
            assert match is not None
            self.at = match.end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def value(self) -> Any:
        """Decodes the value that starts here."""
        while True:
            try:
                value, end = _decode(self.text, self.at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - _LONGEST_TOKEN
                if cut and len(self.text) - self.at < LONGEST_ROW and self.more():
                    continue
                raise ValueError(f"{error.msg} at character {self._before + error.pos}") from error
            except RecursionError as error:
                raise ValueError(f"values within values without end at character {self.place}") from error
            # A number that ends near the window's end may go on behind it: `1` may be the begin of `1e+5`.
            if end + 3 >= len(self.text) and self.more():
                continue
            self.at = end
            return value
