"""A misspelled key of images is found in every kind of source, and nothing else is taken for one."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from typer.testing import CliRunner

from tests.data.rows.test_hugging_face import EMBEDDED, PNGS
from tests.data.rows.test_records import row
from visper.cli import app
from visper.config import Source
from visper.data.checks.unread_images import unread_images
from visper.data.rows.formats import unread_image
from visper.data.rows.records import DropList
from visper.data.rows.sources import open_records

TURNS = row("What?", "A cat.")["conversations"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.mark.parametrize(
    "value", ["a.jpg", "coco/my photo.PNG", ["a.webp", "b.webp"], {"bytes": "aGk=", "path": None}, {"path": "a.tif"}]
)
def test_a_value_that_names_or_holds_an_image_is_found(value: Any) -> None:
    assert unread_image({"conversations": TURNS, "source": "coco", "img": value}) == "img"


@pytest.mark.parametrize(
    "more",
    [
        {"source": "coco", "model": "gpt-4.jpgs", "score": 3, "tags": [], "meta": {"path": "a.txt", "bytes": 1200}},
        {"note": "the photo is\na.jpg"},
        {"img": None},
        {"image": None, "original": "a.jpg"},
        {"images": [], "original": "a.jpg"},
        {"text": "a.jpg", "system": "a.jpg", "id": "a.jpg"},
    ],
)
def test_other_values_and_rows_that_say_that_they_have_no_image_are_not(more: dict[str, Any]) -> None:
    assert unread_image({"conversations": TURNS, **more}) is None


def source(folder: Path, kind: str, key: str, values: list[Any], feature: Any) -> Source:
    if kind in ("json", "jsonl"):
        rows = [{"conversations": TURNS} | ({key: value} if value else {}) for value in values]
        text = json.dumps(rows) if kind == "json" else "".join(json.dumps(one) + "\n" for one in rows)
        (folder / f"rows.{kind}").write_text(text)
        return Source(json_file=str(folder / f"rows.{kind}"), images=str(folder))
    text_of = datasets.Value("string")
    features = datasets.Features({"conversations": [{"from": text_of, "value": text_of}], key: feature})
    found = datasets.Dataset.from_dict({"conversations": [TURNS] * len(values), key: values}, features=features)
    images = str(folder) if isinstance(values[0], str) else None
    if kind == "hf":
        found.save_to_disk(str(folder / "rows"))
        return Source(hf=str(folder / "rows"), images=images)
    found.to_parquet(str(folder / "rows.parquet"))
    return Source(parquet=str(folder / "rows.parquet"), images=images)


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet", "hf", "embedded", "binary"])
def test_every_kind_of_source_is_warned_of(tmp_path: Path, kind: str) -> None:
    held: dict[str, tuple[list[Any], Any]] = {
        "embedded": (EMBEDDED[:2], datasets.Image()),
        "binary": (PNGS[:2], datasets.Value("binary")),
    }
    values, feature = held.get(kind, (["a.jpg", "b.jpg"], datasets.Value("string")))
    given = source(tmp_path, "hf" if kind in held else kind, "img", [*values, None], feature)
    records = open_records([given], DropList())
    assert len(records) == 3 and not records.has_image.any()
    (warning,) = unread_images(records)
    assert warning.startswith("2 rows of 'rows' without 'image', whose 'img' looks like one")
    assert "columns: {image: img}" in warning
    (left,) = unread_images(records.select(records.rows == 1))
    assert left.startswith("1 row of 'rows' ") and "rows/1/" in left


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_a_mapped_column_and_rows_of_text_are_not_warned_of(tmp_path: Path, kind: str) -> None:
    given = source(tmp_path, kind, "img", ["a.jpg", None], datasets.Value("string"))
    mapped = given.model_copy(update={"columns": {"image": "img"}})
    assert unread_images(open_records([mapped], DropList())) == []
    (tmp_path / "text").mkdir()
    text = source(tmp_path / "text", kind, "topic", ["cats", "dogs"], datasets.Value("string"))
    assert unread_images(open_records([text], DropList())) == []


def test_a_tag_without_its_image_names_the_key_that_looks_like_it(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([row("<image>\nWhat?", "A cat.", img="a.jpg")]))
    drops = DropList()
    open_records([(tmp_path / "rows.json", tmp_path)], drops)
    (drop,) = drops
    assert drop.reason == "media without a file" and "'img' looks like one" in drop.detail


def test_a_check_counts_and_explains_unread_images(tmp_path: Path) -> None:
    rows = [row("What?", "A cat.", img="a.jpg"), row("1 + 1?", "2")]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    report = tmp_path / "report.json"
    command = ["data", "check", str(tmp_path / "rows.json"), "--images", str(tmp_path), "--report", str(report)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0 and "'img' looks like one and is not read" in " ".join(done.output.split())
    assert json.loads(report.read_text())["files"][0]["total"]["unread image"] == 1
