"""A row read from a Parquet file equals the row that was written, in this library and other readers."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from tests import tiny
from tests.conftest import outside
from tests.data.rows.test_records import survey
from tests.data.test_chat import CHATML, make_processor
from visper.common.errors import DataError
from visper.config import Source
from visper.data.chat import ConversationEncoder
from visper.data.checks.digests import contents_of
from visper.data.collator import Sample
from visper.data.dataset import ConversationDataset
from visper.data.rows.parquet import GROUP_ROWS, write_parquet
from visper.data.rows.records import Drop, DropList
from visper.data.rows.sources import open_records
from visper.data.rows.table import Records

SMALL = 1  # byte: a file a group


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return tiny.write_rows(tmp_path / "rows", images=GROUP_ROWS + 20, text_rows=GROUP_ROWS)


def from_files(rows: Path) -> Records:
    return open_records([(rows / "rows.json", rows / "images")], DropList())


def from_parquet(folder: Path, drops: DropList | None = None) -> Records:
    return open_records([Source(parquet=f"{folder}/*.parquet")], drops or DropList())


def own_id(sample_id: str) -> str:
    return sample_id.split("/", 2)[2]


def same(one: Sample, other: Sample) -> bool:
    if (one.pixel_values is None) != (other.pixel_values is None):
        return False
    pixels = one.pixel_values is None or bool((one.pixel_values == other.pixel_values).all())  # type: ignore[union-attr]
    return pixels and (one.input_ids, one.labels) == (other.input_ids, other.labels)


def test_every_sample_comes_back_the_same(rows: Path, tmp_path: Path) -> None:
    records = from_files(rows)
    assert write_parquet(records, tmp_path / "out", DropList(), SMALL) == [GROUP_ROWS, GROUP_ROWS, 20]
    encoder = ConversationEncoder(make_processor(CHATML), 500)
    files, parquet = ConversationDataset(records, encoder), ConversationDataset(from_parquet(tmp_path / "out"), encoder)
    assert len(files) == len(parquet) == 2 * GROUP_ROWS + 20
    expected = {own_id(sample.id): sample for sample in (files[i] for i in range(len(files)))}
    for i in range(len(parquet)):
        sample = parquet[i]
        assert isinstance(sample, Sample) and same(sample, expected.pop(own_id(sample.id)))
    assert not expected


def test_conversations_come_back_with_their_white_space_and_places(rows: Path, tmp_path: Path) -> None:
    image, answer = {"type": "image"}, {"role": "assistant", "content": "A <image> b\n"}
    contents: list[Any] = [
        [
            {"type": "text", "text": " is "},
            image,
            {"type": "text", "text": "\nor "},
            image,
            {"type": "text", "text": "?\n"},
        ],
        [image, {"type": "text", "text": "\nwhat? "}],
        [image],
        " <image> or <image>\n",
        "what <image>",
        "no tag ",
        "text with <image> inside ",
        " ",
    ]
    counts = [2, 1, 1, 2, 1, 1, 0, 1]
    written = [
        {"images": ["0.png", "1.png"][:count], "messages": [{"role": "user", "content": content}, answer]}
        for content, count in zip(contents, counts, strict=True)
    ]
    (rows / "rows.json").write_text(json.dumps([row | {"id": i} for i, row in enumerate(written)]))
    write_parquet(from_files(rows), tmp_path / "out", DropList())
    found = {own_id(record.id): record for record in from_parquet(tmp_path / "out")}
    assert len(found) == len(written)
    for record in from_files(rows):
        again = found[own_id(record.id)]
        assert again.turns == record.turns
        assert [(image.turn, image.at) for image in again.images] == [(image.turn, image.at) for image in record.images]


def test_datasets_reads_images_and_conversations(rows: Path, tmp_path: Path) -> None:
    write_parquet(from_files(rows), tmp_path / "out", DropList())
    found = datasets.load_dataset("parquet", data_files=f"{tmp_path}/out/*.parquet", split="train")
    row = next(row for row in found if row["image"] is not None)
    assert isinstance(row["image"], Image.Image) and row["messages"][0]["content"][0]["type"] == "image"


def test_the_order_is_shuffled_by_the_seed(rows: Path, tmp_path: Path) -> None:
    ids = []
    for number, seed in enumerate((0, 0, 1)):
        write_parquet(from_files(rows), tmp_path / str(number), DropList(), SMALL, seed)
        ids.append([own_id(record.id) for record in from_parquet(tmp_path / str(number))])
    assert ids[0] == ids[1] != ids[2] and sorted(ids[0]) == sorted(ids[2])


def test_rows_without_an_image_file_are_left_out_and_named(rows: Path, tmp_path: Path) -> None:
    (rows / "images" / "3.png").unlink()
    (rows / "images" / "5.png").write_bytes(b"")
    drops = DropList()
    assert sum(write_parquet(from_files(rows), tmp_path / "out", drops)) == 2 * GROUP_ROWS + 18
    assert drops.counts() == {"missing image": 1, "empty image file": 1}
    with pytest.raises(DataError, match=r"2 of 220 rows \(0\.9%\), allowed 0\.5%: .*, then --drop-list FILE"):
        write_parquet(from_files(rows), tmp_path / "fewer", DropList(), drop_limit=0.005)
    assert not (tmp_path / "fewer").exists()


def test_rows_that_are_too_bad_to_write_are_refused_before_any_image_is_read(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("visper.data.rows.parquet._row", None)
    with pytest.raises(DataError, match="too many bad rows"):
        write_parquet(from_files(rows), tmp_path / "out", DropList([Drop("one", "no answer", "")]), drop_limit=0.001)


def test_an_interrupted_writing_leaves_nothing(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> int:
        raise OSError("disk full")

    monkeypatch.setattr("visper.data.rows.parquet._write_file", stop)
    with pytest.raises(OSError, match="disk full"):
        write_parquet(from_files(rows), tmp_path / "out" / "parquet", DropList())
    assert not (tmp_path / "out").exists()


def test_a_folder_that_exists_is_never_written_into(rows: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="exists: remove it"):
        write_parquet(from_files(rows), rows, DropList())


def test_real_photographs_survive(tmp_path: Path) -> None:
    folder = outside("photos")
    records = open_records([(folder / "instruct.json", folder)], DropList())
    drops = DropList()
    write_parquet(records, tmp_path / "out", drops, 1 << 19)
    parquet = from_parquet(tmp_path / "out", drops)
    assert len(parquet) == len(records) and not len(drops)
    encoder = ConversationEncoder(make_processor(CHATML), 4096)
    assert len(survey(parquet, encoder, drops)[0]) == len(records)
    by_id = {own_id(record.id): record for record in records}
    for index in range(0, len(parquet), 7):
        images = by_id[own_id(parquet[index].id)].images
        assert contents_of(parquet, index) == [Path(image.path).read_bytes() for image in images]
