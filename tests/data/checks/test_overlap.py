"""Images of two sets are compared by content, wherever they are."""

import json
import shutil

import pytest

from tests import tiny
from visper.config import Source
from visper.data.checks import overlap
from visper.data.checks.overlap import file_images, row_images, shared_images
from visper.data.rows.parquet import write_parquet
from visper.data.rows.records import DropList
from visper.data.rows.sources import open_records


@pytest.fixture
def rows(tmp_path):
    return tiny.write_rows(tmp_path / "rows", images=6, text_rows=1)


@pytest.fixture
def records(rows):
    return open_records([(rows / "rows.json", rows / "images")], DropList())


@pytest.fixture
def embedded(records, tmp_path):
    write_parquet(records, tmp_path / "parquet", DropList())
    return open_records([Source(parquet=str(tmp_path / "parquet" / "*.parquet"))], DropList())


def test_a_copy_is_found_in_files_and_in_parquet(rows, records, embedded, tmp_path):
    own = tiny.write_rows(tmp_path / "own", images=3, seed=9) / "images"
    shutil.copy(rows / "images" / "4.png", own / "copy.png")
    few = file_images(sorted(own.iterdir()))
    for many in (records, embedded):
        ((name, same),) = shared_images(few, many).values()
        assert (name, same.rpartition("/")[2]) == (str(own / "copy.png"), "4.png")


def test_the_same_file_is_found_under_another_root_and_from_parquet(rows, records, embedded):
    other = open_records([(rows / "rows.json", rows / "images" / ".." / "images")], DropList())
    for few in (other, embedded):
        assert len(shared_images(row_images(few, range(len(few))), records)) == 6
    assert (
        shared_images(row_images(embedded, [0, 1]), embedded).keys()
        <= shared_images(row_images(embedded, range(7)), embedded).keys()
    )


@pytest.mark.parametrize("column", ["image", "images"])
def test_only_images_of_an_equal_size_are_hashed(rows, tmp_path, monkeypatch, column):
    file = rows / "images" / "0.png"
    file.write_bytes(file.read_bytes() + b"more")
    if column == "images":
        written = json.loads((rows / "rows.json").read_text())
        turns = [{"from": "human", "value": "<image><image>\nwhat?"}, {"from": "gpt", "value": "two"}]
        written.append({"id": "two", "image": ["1.png", "0.png"], "conversations": turns})
        (rows / "rows.json").write_text(json.dumps(written))
    records = open_records([(rows / "rows.json", rows / "images")], DropList())
    write_parquet(records, tmp_path / "parquet", DropList())
    embedded = open_records([Source(parquet=str(tmp_path / "parquet" / "*.parquet"))], DropList())
    few, hashed = file_images([file]), []
    monkeypatch.setattr(overlap, "digest", lambda content: hashed.append(content) or content)
    assert list(shared_images(few, records).values()) == [(str(file), str(file))]
    assert len(hashed) == 2
    assert len(shared_images(few, embedded)) == 1
    assert len(hashed) == (2 + 2 if column == "image" else 2 + 1 + 3)


def test_an_image_that_cannot_be_read_is_left_out(rows, records):
    (rows / "images" / "0.png").unlink()
    assert len(row_images(records, range(len(records)))) == 5
    assert len(shared_images(row_images(records, range(len(records))), records)) == 5
