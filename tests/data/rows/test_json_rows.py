"""Rows are read in every encoding, compression and layout of their file; other formats are named."""

import gzip
import json
from pathlib import Path

import pytest

from tests.conftest import outside
from tests.data.rows.test_records import row
from visper.common.errors import DataError
from visper.data.rows.json_rows import read_rows

ROWS = [row("Qué?", "😀 A cat."), row("B?", "b", image="b.jpg"), row("C?", "c")]
LAYOUTS = {
    "list": json.dumps(ROWS, ensure_ascii=False),
    "indented list": json.dumps(ROWS, ensure_ascii=False, indent=2),
    "list, one row per line": "[\n" + ",\n".join(json.dumps(r, ensure_ascii=False) for r in ROWS) + "\n]\n",
    "lines": "\n".join(json.dumps(r, ensure_ascii=False) for r in ROWS) + "\n",
    "lines of Windows": "\r\n\r\n".join(json.dumps(r, ensure_ascii=False) for r in ROWS),
    "indented objects": "\n".join(json.dumps(r, ensure_ascii=False, indent=2) for r in ROWS),
    "objects on one line": " ".join(json.dumps(r) for r in ROWS),
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32-be"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_encoding_and_layout_is_read(
    tmp_path: Path, layout: str, suffix: str, encoding: str, zipped: bool
) -> None:
    if layout == "objects on one line":
        suffix = ".json"  # under .jsonl it is one broken line
    content = LAYOUTS[layout].encode(encoding)
    file = tmp_path / f"rows{suffix}{'.gz' if zipped else ''}"
    file.write_bytes(gzip.compress(content) if zipped else content)
    assert list(read_rows(file)) == ROWS


BROKEN = {
    "cut": "{ half a row",
    "cut number": '{"id": 1',
    "text": "plain text",
    "deep": "[" * 100_000,
    "long number": '{"id": ' + "1" * 5000 + "}",
}


@pytest.mark.parametrize("at", [0, 1, 3])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_line_spoils_no_other(tmp_path: Path, name: str, at: int) -> None:
    lines = [json.dumps(r) for r in ROWS]
    lines.insert(at, BROKEN[name])
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    rows = list(read_rows(tmp_path / "x.jsonl"))
    assert rows.pop(at) == BROKEN[name] and rows == ROWS


@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
def test_bytes_that_are_not_utf8_spoil_their_row_alone(tmp_path: Path, name: str) -> None:
    lines = [json.dumps(r, ensure_ascii=False).encode() for r in ROWS]
    lines[1] = lines[1].replace(b"B?", b"caf\xe9")
    text = b"\n".join(lines) if name == "x.jsonl" else b"[" + b",".join(lines) + b"]"
    (tmp_path / name).write_bytes(text)
    rows = list(read_rows(tmp_path / name))
    assert [rows[0], rows[2]] == [ROWS[0], ROWS[2]]
    assert rows[1]["conversations"][0]["value"] == "caf\udce9"  # a bad row for ``parse_row``


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"PAR1\x15\x04", "a Parquet file: name it as {parquet: PATH}"),
        (b"PK\x03\x04\x14", "a zip archive"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"<!doctype html><html></html>", "an HTML or XML page"),
        (b"\x28\xb5\x2f\xfd\x04", "compressed by zstd"),
        (gzip.compress(b'[{"id": 1}]' * 1000, mtime=0)[:-20], "is it complete?"),
        (b'{"data": [1, 2], "version": 1}', "one object with the keys 'data', 'version': expected a list of rows"),
        (b'{\n "data": [1, 2]\n}', "one object with the keys 'data'"),
        (b'{"info": 1, "data": [{"text": "a"}]}', "If the rows are the list under 'data', write only this list"),
        (b'{"1": {"text": "a"}, "2": {"text": "b"}}', "keys '1', '2': .* write them as a list, without the keys"),
        (b'{"image": "a.jpg", "conversations": [{"from": "human"}]}', r"one row, put it in brackets, \[\{...\}\]"),
        (b'"[{}]"', "contains only a text: expected .* the file was encoded twice"),
        (b"17", "contains only a number: .* check that this is the file of the rows"),
        (b"", "the file is empty"),
        (b"[" * 100_000, "nested too deeply"),
        (b'[{"a": "b"} {"a": "b"}]', "expected ',' or ']' at character 12"),
        ("[1, é]".encode("utf-16") + b"\x00\xd8", "not JSON"),
    ],
)
def test_what_is_not_rows_is_named(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(DataError, match=says):
        list(read_rows(tmp_path / "x.json"))


@pytest.mark.parametrize(("name", "rows", "broken"), [("bom.jsonl", 3, 0), ("deep.jsonl", 2, 1)])
def test_known_faults_are_read(name: str, rows: int, broken: int) -> None:
    found = list(read_rows(outside("faults") / name))
    assert [isinstance(r, dict) for r in found].count(True) == rows and len(found) == rows + broken
