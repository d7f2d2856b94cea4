"""Nothing outside the images folder is read or written, wherever a path in a row or a link leads."""

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.data.rows.test_records import survey
from tests.data.test_chat import CHATML, make_processor
from tests.records import check_file
from visper.common.errors import DataError
from visper.common.files import OUTSIDE
from visper.data.chat import ConversationEncoder
from visper.data.checks.digests import contents_of, digests_of
from visper.data.checks.report import repair
from visper.data.dataset import ConversationDataset
from visper.data.rows.parquet import write_parquet
from visper.data.rows.records import Drop, DropList
from visper.data.rows.sources import open_records
from visper.data.rows.table import Records

NAMES = ("good.jpg", "link.jpg", "far.jpg", "folder/gif.jpg", "../secret.jpg")
REFUSED = {2: OUTSIDE, 3: OUTSIDE}  # by a link; the last is refused by its name, when the rows are read


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Rows whose images lie under ``images/``, or seem to; the GIF outside has the name of a JPEG."""
    images = tmp_path / "images"
    images.mkdir()
    (tmp_path / "away").mkdir()
    red = Image.new("RGB", (8, 8), "red")
    red.save(images / "good.jpg")
    red.save(tmp_path / "secret.jpg")
    red.save(tmp_path / "away" / "gif.jpg", "GIF")
    (images / "link.jpg").symlink_to("good.jpg")
    (images / "far.jpg").symlink_to(tmp_path / "secret.jpg")
    (images / "folder").symlink_to(tmp_path / "away")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"id": name, "image": name, "conversations": turns} for name in NAMES]))
    return file


@pytest.fixture
def records(rows: Path) -> Records:
    drops = DropList()
    records = open_records([(rows, rows.parent / "images")], drops)
    assert drops.counts() == {OUTSIDE: 1} and len(records) == 4
    return records


def test_such_a_row_is_a_drop_of_the_survey_and_of_the_dataset(records: Records) -> None:
    encoder, drops = ConversationEncoder(make_processor(CHATML), 500), DropList()
    files = [str(folder / name) for _, _, folder, name in records.image_files()]
    assert [record.images[0].path for record in survey(records, encoder, drops)[0]] == files[:2]
    assert drops.counts() == {OUTSIDE: 2}
    samples = list(map(ConversationDataset(records, encoder).__getitem__, range(4)))
    assert {i: s.reason for i, s in enumerate(samples) if isinstance(s, Drop)} == REFUSED


def test_its_image_is_not_hashed_nor_read_nor_written_into_parquet(records: Records, tmp_path: Path) -> None:
    good, same, *others = digests_of(records).values()
    assert good == same is not None and others == [None, None]
    with pytest.raises(DataError, match=OUTSIDE):
        contents_of(records, 2)
    drops = DropList()
    assert write_parquet(records, tmp_path / "parquet", drops) == [2] and drops.counts() == {OUTSIDE: 2}


def test_repair_writes_nothing_outside_and_fetches_nothing_there(rows: Path) -> None:
    before = (rows.parent / "away" / "gif.jpg").read_bytes()
    report = check_file(rows, rows.parent / "images")
    assert report.drops.counts() == {OUTSIDE: 3} and report.counts["total"]["mislabeled image"] == 0
    fetched: list[Path] = []
    mended, lost = repair([report], fetched.extend)
    assert mended == 0 and not fetched and {drop.reason for drop in lost} == {OUTSIDE}
    assert (rows.parent / "away" / "gif.jpg").read_bytes() == before
    assert (rows.parent / "images" / "far.jpg").is_symlink()
