"""The digest of rows follows what training reads, and nothing else."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from visper.data.rows import table
from visper.data.rows.table import RecordTable, cells, write_table
from visper.data.rows.table_digest import rows_digest


def said(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]


ROWS: list[dict[str, Any]] = [
    {"id": "a", "image": "a.jpg", "conversations": said("<image>\nA <image> B", "C")},
    {"id": "b", "conversations": said("D", "E")},
    {"id": "c", "images": ["a.jpg", "b.jpg"], "conversations": said("<image> F <image>", "G")},
    {"id": "d", "conversations": []},
]
CHANGES: dict[str, dict[str, Any]] = {
    "an id": {"id": "x"},
    "an image": {"images": ["a.jpg", "x.jpg"]},
    "the order of images": {"images": ["b.jpg", "a.jpg"]},
    "the place of an image": {"conversations": said("<image> F", "G", "<image>", "G")},
    "a text": {"conversations": said("<image> F <image>", "x")},
    "where a text ends": {"conversations": said("<image> F <image>G", "")},
    "a role": {"conversations": [{"from": "system", "value": "S"}, *said("<image> F <image>", "G")]},
    "a row that is bad now": {"conversations": []},
}


def digest(rows: list[dict[str, Any]], place: Path) -> str:
    write_table(map(cells, rows), place)
    return rows_digest(RecordTable(place))


def test_another_layout_of_the_same_rows_has_the_same_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest(ROWS, tmp_path / "a.arrow")
    monkeypatch.setattr(table, "BATCH_ROWS", 3)
    monkeypatch.setattr(table, "SCHEMA", pa.schema([("newer", pa.string()), *reversed(table.SCHEMA)]))
    assert digest(ROWS, tmp_path / "b.arrow") == before
    assert (tmp_path / "a.arrow").read_bytes() != (tmp_path / "b.arrow").read_bytes()


def test_the_words_of_a_reason_do_not_count(tmp_path: Path) -> None:
    before = digest(ROWS, tmp_path / "a.arrow")
    reworded = [{**row, "detail": "other words"} if row.get("reason") else row for row in map(cells, ROWS)]
    write_table(reworded, tmp_path / "b.arrow")
    assert rows_digest(RecordTable(tmp_path / "b.arrow")) == before


def test_a_row_that_is_no_longer_used_changes_the_digest(tmp_path: Path) -> None:
    unused = [{**row, "reason": row.get("reason", "no answer")} for row in map(cells, ROWS)]
    write_table(unused, tmp_path / "a.arrow")
    assert rows_digest(RecordTable(tmp_path / "a.arrow")) != digest(ROWS, tmp_path / "b.arrow")


@pytest.mark.parametrize("what", CHANGES)
def test_whatever_training_reads_changes_the_digest(tmp_path: Path, what: str) -> None:
    changed = json.loads(json.dumps(ROWS))
    changed[2] |= CHANGES[what]
    assert digest(changed, tmp_path / "a.arrow") != digest(ROWS, tmp_path / "b.arrow")


def test_every_row_counts_beyond_the_first_thousand(tmp_path: Path) -> None:
    many = [{"id": str(number), "conversations": said("Q", "A")} for number in range(2500)]
    whole = digest(many, tmp_path / "a.arrow")
    assert digest([*many[:-1], {**many[-1], "conversations": said("Q", "B")}], tmp_path / "b.arrow") != whole
    assert digest(many[:-1], tmp_path / "c.arrow") != whole
