"""Peculiarities of published conversation files."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from visper.common.console import printable
from visper.common.errors import DataError
from visper.data.chat import ConversationEncoder
from visper.data.dataset import keep_good, lost_images
from visper.data.rows import formats
from visper.data.rows.formats import parse_row
from visper.data.rows.json_rows import read_rows
from visper.data.rows.lengths import Lengths, measure
from visper.data.rows.records import DropList, Record, ShownImage, own_id, source_names
from visper.data.rows.table import Records


def row(first: str, *more: str, **keys: Any) -> dict[str, Any]:
    texts = [first, *more]
    turns = [{"from": "human" if i % 2 == 0 else "gpt", "value": text} for i, text in enumerate(texts)]
    return {"id": "1", **keys, "conversations": turns}


def read_records(sources: Sequence[tuple[Path, Path]], drops: DropList) -> list[Record]:
    """What ``open_records`` must give, without tables and caches."""
    records = []
    for name, (file, images) in zip(source_names([file for file, _ in sources]), sources, strict=True):
        for index, content in enumerate(read_rows(file)):
            sample_id = f"{name}/{index}/{own_id(content)}"
            try:
                record = parse_row(content, sample_id, images)
                shown = "" if own_id(content) or not record.images else printable(formats.parse(content).images[0].path)
                records.append(replace(record, id=sample_id + shown))
            except DataError as error:
                drops.add(sample_id, error.reason, error.detail)
    return records


def survey(records: Records, encoder: ConversationEncoder, drops: DropList) -> tuple[Records, Lengths]:
    """The look at every row that training takes before its first step."""
    found = measure(records, encoder, quiet=True)
    return keep_good(records, found, lost_images(records, found), drops)


def parse(content: Any) -> Record:
    return parse_row(content, "s/0/1", Path("images"))


@pytest.mark.parametrize("text", ["<image>\nWhat?", "What?\n<image>", "What? <image>", "<image>What?"])
def test_the_tag_is_taken_out_wherever_it_stands(text: str) -> None:
    record = parse(row(text, "A cat.", image="a.jpg"))
    assert record.turns[0].text == "What?"
    assert record.images == (ShownImage(str(Path("images/a.jpg")), 0),)


def test_an_image_without_a_tag_leads_the_first_question() -> None:
    record = parse(row("What?", "A cat.", "Sure?", "Yes.", image="a.jpg"))
    assert (record.images[0].turn, record.turns[0].text) == (0, "What?")


def test_the_image_belongs_to_the_turn_that_holds_its_tag() -> None:
    assert parse(row("Hello", "Hi", "<image>\nWhat?", "A cat.", image="a.jpg")).images[0].turn == 2


@pytest.mark.parametrize("keys", [{}, {"image": None}, {"image": ""}, {"model": ""}])
def test_the_literal_tag_of_a_text_row_stays_text(keys: dict[str, Any]) -> None:
    record = parse(row("What does <image> mean?", "A tag.", **keys))
    assert not record.images
    assert record.turns[0].text == "What does <image> mean?"


def test_a_tag_in_an_answer_stays_text() -> None:
    assert parse(row("<image>\nWhat?", "An <image>.", image="a.jpg")).turns[1].text == "An <image>."


def test_a_first_turn_of_the_model_is_dropped() -> None:
    content = row("<image>\nWhat?", "A box.", image="a.jpg")
    content["conversations"].insert(0, {"from": "gpt", "value": "Hi"})
    assert [turn.role for turn in parse(content).turns] == ["user", "assistant"]


def test_an_empty_answer_is_kept() -> None:
    assert [turn.text for turn in parse(row("A?", "", "B?", "b")).turns] == ["A?", "", "B?", "b"]


def test_ids_are_unique_though_rows_repeat_theirs(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        rows = [row("Q", "A", id=33471), row("Q", "A", id="33471"), row("Q", "A")]
        (tmp_path / folder / "mix.json").write_text(json.dumps(rows))
    sources = [(tmp_path / folder / "mix.json", tmp_path) for folder in ("a", "b")]
    records = read_records(sources, DropList())
    assert len({record.id for record in records}) == 6


def test_json_and_jsonl_give_the_same_records(tmp_path: Path) -> None:
    rows = [row("Q", "A", model=""), row("<image>\nQ", "A", image="a.jpg")]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps(r) for r in rows) + "\n\n")
    from_json, from_lines = (
        read_records([(tmp_path / f"x.{kind}", Path("i"))], DropList()) for kind in ("json", "jsonl")
    )
    assert from_json == from_lines
    assert len(from_json) == 2


def test_bad_rows_are_counted_and_the_others_read(tmp_path: Path) -> None:
    lines = [json.dumps(row("Q", "A")), "{ half a row", json.dumps(row("Q"))]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    drops = DropList()
    assert len(read_records([(tmp_path / "x.jsonl", Path("i"))], drops)) == 1
    assert drops.counts() == {"not a row": 1, "no answer": 1}


@pytest.mark.parametrize(("content", "reason"), [("[1,", "not JSON"), ("{}", "not a list of rows")])
def test_a_file_that_is_no_list_of_rows_is_refused(tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(DataError, match=reason):
        read_records([(tmp_path / "x.json", Path("i"))], DropList())


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.json"):
        read_records([(tmp_path / "absent.json", Path("i"))], DropList())


def test_the_drop_list_counts_a_row_once_and_is_written_whole(tmp_path: Path) -> None:
    drops = DropList()
    drops.add("a", "missing image", "x.jpg")
    drops.add("a", "missing image", "x.jpg")
    drops.add("b", "no supervised token")
    drops.write(tmp_path / "run" / "dropped.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "run" / "dropped.jsonl").read_text().splitlines()]
    assert lines[0] == {"sample_id": "a", "reason": "missing image", "detail": "x.jpg"}
    assert len(lines) == 2
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["dropped.jsonl"]


def test_too_many_bad_rows_are_refused_with_their_reasons() -> None:
    drops = DropList()
    drops.add("a", "missing image", "x.jpg")
    drops.check(total=100, limit=0.01)
    with pytest.raises(DataError, match=r"1 of 50 rows \(2.0%\), allowed 1.0%: missing image 1"):
        drops.check(total=50, limit=0.01)


def test_a_run_without_a_good_row_is_refused_whatever_the_limit() -> None:
    drops = DropList()
    drops.add("a", "missing image")
    with pytest.raises(DataError, match=r"no row is left to train on, whatever the limit\. Repair the data$") as error:
        drops.check(total=1, limit=1.0)
    assert "drop_limit" not in str(error.value)
