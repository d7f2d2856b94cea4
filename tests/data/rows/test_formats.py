"""All formats of a row give the same record; a row that cannot be trained on as meant is a counted drop."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import outside
from tests.data.rows.test_records import row
from visper.common.errors import DataError
from visper.data.rows.formats import CAPTION_QUESTION, image_names, parse_row
from visper.data.rows.records import DropList, Record, ShownImage, Turn
from visper.data.rows.sources import open_records


def parse(content: Any) -> Record:
    return parse_row(content, "s/0/1", Path("images"))


def turn_of_image(record: Record) -> int:
    (image,) = record.images
    return image.turn


def messages(content: Any, answer: Any = "A cat.", **keys: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}], **keys}


def pairs(*texts: Any, **keys: Any) -> dict[str, Any]:
    """A row as in The Cauldron and FineVision."""
    asked = zip(texts[::2], texts[1::2], strict=True)
    return {"texts": [{"user": user, "assistant": answer, "source": "vqa"} for user, answer in asked], **keys}


IMAGE, WHAT = {"type": "image"}, {"type": "text", "text": "What?"}


@pytest.mark.parametrize(
    "content",
    [
        row("<image>\nWhat?", "A cat.", image="a.jpg"),
        row("<image>\nWhat?", "A cat.", images=["a.jpg"]),
        row("<image>\nWhat?", "A cat.", image="", images="a.jpg"),
        row("<image>\nWhat?", "A cat.", image={"path": "a.jpg"}),
        messages("<image>\nWhat?", image="a.jpg"),
        messages("What?", images=["a.jpg"]),
        messages([IMAGE, WHAT], images=["a.jpg"]),
        messages([WHAT, IMAGE], [{"type": "text", "text": "A cat."}], images=["a.jpg"]),
        messages([{"type": "image", "image": "a.jpg"}, WHAT]),
        messages([{"type": "image", "path": "a.jpg", "image": None}, WHAT], images=[]),
        {"conversations": messages("<image>What?")["messages"], "image": ["a.jpg"]},
        pairs("What?", "A cat.", images=["a.jpg"]),
        pairs("<image>What?", "A cat.", image="a.jpg"),
    ],
)
def test_every_way_to_write_a_row_gives_one_record(content: dict[str, Any]) -> None:
    turns = (Turn("user", "What?"), Turn("assistant", "A cat."))
    assert parse(content) == Record("s/0/1", turns, (ShownImage(str(Path("images/a.jpg")), 0),))


def test_an_image_part_marks_its_turn() -> None:
    content = messages("Hello", "Hi", images=["a.jpg"])
    content["messages"] = [{"role": "system", "content": "Be brief."}, *content["messages"]]
    content["messages"] += [{"role": "user", "content": [IMAGE, WHAT]}, {"role": "assistant", "content": "A cat."}]
    assert turn_of_image(parse(content)) == 3


def test_a_rows_system_key_is_the_system_turn_where_there_is_none() -> None:
    brief, polite = Turn("system", "Be brief."), {"role": "system", "content": "Be polite."}
    content = messages([IMAGE, WHAT], images=["a.jpg"], system="Be brief.")
    record = parse(content)
    assert record.turns[0] == brief and turn_of_image(record) == 1
    assert parse({**row("Hello", "Hi"), "system": "Be brief."}).turns[0] == brief
    assert parse({**content, "messages": [polite, *content["messages"]]}).turns[0] == Turn("system", "Be polite.")
    for empty in (None, ""):
        assert parse({**content, "system": empty}).turns == record.turns[1:]
    with pytest.raises(DataError, match="bad turn"):
        parse({**content, "system": 7})


def test_a_caption_answers_one_question() -> None:
    record = parse({"id": 1, "image": "a.jpg", "text": "A cat."})
    assert record.turns == (Turn("user", CAPTION_QUESTION), Turn("assistant", "A cat.")) and turn_of_image(record) == 0


def test_all_images_of_pairs_come_first_unless_tags_place_them() -> None:
    record = parse(pairs("Same?", "No.", "Why?", "Color.", images=["a.jpg", "b.jpg"]))
    assert [(image.path, image.turn, image.at) for image in record.images] == [
        ("images/a.jpg", 0, 0),
        ("images/b.jpg", 0, 1),
    ]
    assert record.turns[0].text == "\n\nSame?"
    tagged = parse(pairs("<image> or <image>?", "The first.", images=["a.jpg", "b.jpg"]))
    assert tagged.turns[0].text == " or ?" and [image.at for image in tagged.images] == [0, 4]


def marked(**keys: Any) -> dict[str, Any]:
    """A conversation with these keys beside its first answer."""
    content = messages("What?")
    content["messages"][1] |= keys
    return content


@pytest.mark.parametrize("keys", [{"weight": 1}, {"weight": 1.0}, {"loss": True}, {"train": None}])
def test_a_turn_may_be_marked_to_be_trained(keys: dict[str, Any]) -> None:
    assert parse(marked(**keys)).turns == parse(marked()).turns


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (row("<image> and <image>", "Same.", image="a.jpg"), "images and tags differ"),
        (row("<image>\nA?", "a", "<image>\nB?", "b", image="a.jpg"), "images and tags differ"),
        (row("<image>", "Same.", image=["a.jpg", "b.jpg"]), "images and tags differ"),
        (row("What?", "A.", image=7), "bad image path"),
        (row("What?"), "no answer"),
        ({"id": 1}, "no conversation"),
        (pairs(images=["a.jpg", "b.jpg"]), "no conversation"),
        (pairs(None, "A.", images=["a.jpg", "b.jpg"]), "bad turn"),
        (pairs("What?", None, image="a.jpg"), "bad turn"),
        ({"image": "a.jpg", "texts": ["A cat."]}, "no conversation"),
        ({"id": 1, "conversations": []}, "no conversation"),
        ({"id": 1, "conversations": [{"from": "gpt", "value": "Hi"}]}, "turns do not alternate"),
        ({"id": 1, "conversations": [{"from": "human", "value": "a"}] * 2}, "turns do not alternate"),
        ({"id": 1, "conversations": [{"from": "dog", "value": "a"}]}, "bad turn"),
        ({"id": 1, "conversations": [{"from": "human", "value": None}]}, "bad turn"),
        ({"id": 1, "conversations": ["Hi"]}, "bad turn"),
        (row("half \ud83d", "a"), "bad text"),
        ("no row", "not a row"),
        (row("<image>\nWhat?", "A."), "media without a file"),
        (row("<image> What?", "A.", images=[]), "media without a file"),
        (row("What?\n<image>", "A.", image=None), "media without a file"),
        (row("<video>\nWhat?", "A."), "media without a file"),
        (row("Picture 1: <img>demo/a.JPG</img>\nWhat?", "A."), "media without a file"),  # Qwen-VL
        (
            row("<image>Find <ref-object>", "<bbox>", image="a.jpg", objects={"bbox": [[1, 2, 3, 4]]}),
            "unfilled placeholder",
        ),
        (row("Hi", "Hi", "What is said? <audio>", "A."), "media without a file"),
        (messages([IMAGE, WHAT]), "media without a file"),
        (row("What?", "A.", video="a.mp4"), "media other than images"),
        (row("What?", "A.", videos=["a.mp4"], image="a.jpg"), "media other than images"),
        (row("What?", "A.", audio={"path": "a.wav"}), "media other than images"),
        (messages([{"type": "video", "video": "a.mp4"}, WHAT]), "media other than images"),
        (row("<image>", "A.", images=["a.jpg", "b.jpg"]), "images and tags differ"),
        (row("<image>", "A.", image="a.jpg", images=["b.jpg"]), "images and tags differ"),
        (messages([IMAGE, IMAGE, WHAT], images=["a.jpg"]), "images and tags differ"),
        (messages([IMAGE, WHAT], [IMAGE], images=["a.jpg"]), "bad turn"),
        (messages([{"type": "tool"}]), "bad turn"),
        (marked(weight=0), "turn with a weight"),
        (marked(loss=False), "turn with a weight"),
        (marked(train=False), "turn with a weight"),
        (marked(weight=0.5), "turn with a weight"),
        ({"text": "A cat."}, "no image"),
        (row("Q", "A", image="http://a.b/c.jpg"), "bad image path"),
        (row("Q", "A", image="data:image/png;base64,iVBO"), "bad image path"),
        (row("Q", "A", image="x" * 300 + ".png"), "bad image path"),
        (row("Q", "A", image="../a.jpg"), "image outside its folder"),
        (row("Q", "A", image="a/../../a.jpg"), "image outside its folder"),
        (row("Q", "A", image="/etc/hostname"), "image outside its folder"),
    ],
)
def test_a_bad_row_says_why(content: Any, reason: str) -> None:
    with pytest.raises(DataError) as error:
        parse(content)
    assert error.value.reason == reason


def test_swapped_turns_are_recognized_where_they_would_show() -> None:
    swapped = [("gpt", "<image>\nWhat?"), ("human", "A cat."), ("gpt", "Sure?"), ("human", "Yes.")]
    turns = [{"from": who, "value": text} for who, text in swapped]
    with pytest.raises(
        DataError, match=r"the model's first turn shows the image: .*if user and model are swapped"
    ) as bad:
        parse({"image": "a.jpg", "conversations": turns})
    assert bad.value.reason == "turns swapped"
    with pytest.raises(
        DataError, match=r"no answer: the model's only turn comes first .*if user and model are swapped"
    ):
        parse({"conversations": [{"from": "gpt", "value": "What?"}, {"from": "human", "value": "A cat."}]})
    system = {"role": "system", "content": "Be brief."}
    with pytest.raises(DataError, match="found system, assistant, user; if user and model are swapped"):
        parse({"messages": [system, *({"role": who, "content": "A"} for who in ("assistant", "user"))]})


@pytest.mark.parametrize("answer", ["<image>\nA cat.", "A cat. <image>"])
def test_the_tag_of_the_rows_image_is_not_trained_as_an_answer(answer: str) -> None:
    with pytest.raises(DataError, match="tag in an answer"):
        parse({"image": "a.jpg", "text": answer})
    with pytest.raises(DataError, match="tag in an answer"):
        parse(row("What?", answer, image="a.jpg"))
    assert parse(row("<image>\nWhat?", answer, image="a.jpg")).turns[1].text == answer


def test_a_conversation_may_begin_with_the_model() -> None:
    turns = [{"from": "gpt", "value": "Hello"}, *row("<image>\nWhat?", "A cat.")["conversations"]]
    assert [turn.text for turn in parse({"image": "a.jpg", "conversations": turns}).turns] == ["What?", "A cat."]
    turns[0]["value"] = "<image>"  # without an image, a tag is text
    assert parse({"conversations": [*turns[:1], *row("What?", "A cat.")["conversations"]]}).turns[0].text == "What?"


def test_a_broken_line_is_shown() -> None:
    with pytest.raises(DataError, match=r"a line that is not JSON: '\{ half a row'"):
        parse("{ half a row")


@pytest.mark.parametrize("text", ["What does <image> mean?", "In HTML, <video> is a tag.", "What is `<audio>`?"])
def test_text_may_mention_a_tag(text: str) -> None:
    assert parse(row(text, "A tag.")).turns[0].text == text


@pytest.mark.parametrize(
    ("name", "rows", "reasons"),
    [
        ("odd_rows.json", 2, {"bad image path": 1, "bad turn": 2}),
        ("escaping_names.json", 1, {"image outside its folder": 3}),
        ("images_key/rows.json", 12, {}),
        ("fromlist/rows.json", 120, {"bad turn": 1}),
    ],
)
def test_known_faults_are_drops(name: str, rows: int, reasons: dict[str, int]) -> None:
    drops = DropList()
    records = open_records([(outside("faults") / name, outside("faults"))], drops)
    assert len(records) == rows and drops.counts() == reasons
    assert records.has_image.all()
    assert all(record.id.isprintable() for record in records)


def test_ids_and_details_hold_no_control_characters() -> None:
    drops = DropList()
    drops.add("a", "bad", "\x1b[2J\n\u202egood\ud800")
    assert next(iter(drops)).detail == r"\x1b[2J\n\u202egood\ud800"


def test_names_of_images_are_those_of_every_format(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"image": "a.jpg"}\n{"images": ["b.jpg", 7]}\n[]\n{"image": null}\n')
    assert list(image_names(tmp_path / "x.jsonl")) == ["a.jpg", "b.jpg"]
    content = [{"type": "image", "image": "c.jpg"}, WHAT, IMAGE, {"type": "image", "path": "d.jpg"}, 7]
    odd = [
        messages(content, images=["e.jpg"]),
        messages("What?"),
        {"messages": "d.jpg"},
        {"messages": [7, {"role": 1}]},
    ]
    (tmp_path / "y.jsonl").write_text("\n".join(map(json.dumps, odd)))
    assert list(image_names(tmp_path / "y.jsonl")) == ["e.jpg", "c.jpg", "d.jpg"]
