"""Rows with several images: each image is at the place of its tag, in every format, up to the batch."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from tests.data.rows.test_records import read_records, row, survey
from tests.data.test_chat import CHATML, PROCESSORS, TASK_TOKENS, TEMPLATES, chat, make_processor, supervised
from tests.data.test_dataset import collate, small_pixels
from tests.records import check_file
from visper.cli import app
from visper.common.errors import DataError
from visper.config import Source
from visper.data.chat import ConversationEncoder
from visper.data.checks.digests import contents_of, digest, digests_of
from visper.data.collator import Collator, Sample
from visper.data.dataset import ConversationDataset
from visper.data.images import normalized_pixels, rgb_bytes, student_pixels
from visper.data.rows.formats import parse_row
from visper.data.rows.parquet import write_parquet
from visper.data.rows.records import Drop, DropList, Record, ShownImage, Turn
from visper.data.rows.sources import open_records

A, B, IMAGE = "a.png", "b.png", {"type": "image"}
BLOCK = 4 + len(TASK_TOKENS)


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def named(name: str) -> dict[str, str]:
    return {"type": "image", "image": name}


def parse(content: Any) -> Record:
    return parse_row(content, "r", Path())


@pytest.mark.parametrize(
    "content",
    [
        row("Is <image> or <image> red?", "A.", image=[A, B]),
        row(" Is <image> or <image> red?\n", "A.", images=[A, B]),
        row("Is <image> or <image> red?", "A.", image=A, images=[B]),
        row("Is <image> or <image> red?", "A.", image=[A, None, "", {"path": B}]),
        chat([text("Is "), IMAGE, text(" or "), IMAGE, text(" red?")], "A.", images=[A, B]),
        chat([text("Is <image> or "), IMAGE, text(" red?")], "A.", images=[A, B]),
        chat([text("Is "), named(A), text(" or "), named(B), text(" red?")], "A."),
        chat([text("Is "), IMAGE, text(" or "), named(B), text(" red?")], "A.", images=[A]),
        chat([text("Is "), named(A), text(" or <image> red?")], "A.", image=B),
    ],
)
def test_every_way_to_write_two_images_gives_one_record(content: dict[str, Any]) -> None:
    turns = (Turn("user", "Is  or  red?"), Turn("assistant", "A."))
    assert parse(content) == Record("r", turns, (ShownImage(A, 0, 3), ShownImage(B, 0, 7)))


@pytest.mark.parametrize("second", ["<image>\nAnd here?", "And here? <image>", "And <image> here?"])
def test_the_only_image_of_each_turn_leads_it(second: str) -> None:
    record = parse(row("<image>\nWhat?", "A <image>.", second, "A dog.", image=[A, B]))
    assert record.images == (ShownImage(A, 0), ShownImage(B, 2))
    assert "<image>" not in record.turns[2].text and "<image>" in record.turns[1].text


@pytest.mark.parametrize(
    ("content", "images", "places"),
    [
        (row("<image>\nSame?", "A.", image=[A, B]), 2, 1),
        (row("Same?", "A.", image=[A, B]), 2, 0),
        (row("<image><image>\nSame?", "A.", image=A), 1, 2),
        (row("<image>\nSame?", "A.", "<image>", "A.", image=[A, B, A]), 3, 2),
        (row("<image>\nSame?", "An <image>.", image=[A, B]), 2, 1),
        (chat([IMAGE, text("Same?")], "A.", images=[A, B]), 2, 1),
        (chat([named(A), text("Same?")], "A.", images=[B]), 2, 1),
        ({"image": [A, B], "text": "Two cats."}, 2, 1),
    ],
)
def test_a_list_that_does_not_match_the_tags_is_counted(content: dict[str, Any], images: int, places: int) -> None:
    with pytest.raises(DataError, match=f"images: {images}, tags '<image>' and image parts: {places}; ") as error:
        parse(content)
    assert error.value.reason == "images and tags differ"


ASKED: list[list[Any]] = [
    ["<image>\n<image>\nSame?"],
    ["Is <image> or\n\n<image> é red? <image>"],
    ["<image><image>"],
    [[IMAGE, IMAGE, text("Same?")]],
    [[text("one "), IMAGE, text("two "), IMAGE]],
    ["<image>\nWhat?", "A cat.", "And <image>, <image>?"],
    ["What? <image>", "A cat.", "<image>\nAnd here?"],
]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("asked", ASKED)
def test_training_prompts_equal_inference_prompts_of_stock_processors(name: str, asked: list[Any]) -> None:
    """The stock processor renders and expands the messages of the row itself."""
    processor = make_processor(TEMPLATES[name], system="Be brief.")
    content = chat(*asked, "Fine.")
    shown = json.dumps(asked).count("image>") + json.dumps(asked).count('"image"')
    record = parse({**content, "images": [A] * shown})
    encoder = ConversationEncoder(processor, 5000)
    prompt = processor.apply_chat_template(content["messages"][:-1], tokenize=False, add_generation_prompt=True)
    images = [Image.new("RGB", (9, 6))] * shown
    stock = processor(text=prompt, images=images, return_tensors="np", add_special_tokens=False)
    encoded = encoder.encode(record)
    ids = stock["input_ids"][0].tolist()
    asks = replace(record, turns=record.turns[:-1])
    assert encoder.prompt(asks) == encoded.input_ids[: len(ids)] == ids
    assert encoded.image_tokens == (4,) * shown and len(stock["pixel_values"]) == shown
    assert ids.count(encoder.image_token_id) == 4 * shown
    for token in TASK_TOKENS:
        assert ids.count(processor.tokenizer.convert_tokens_to_ids(token)) == shown


WORDS = st.text("ab <>\n|é", max_size=12)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(sorted(TEMPLATES)),
    st.lists(st.tuples(st.lists(WORDS, min_size=1, max_size=4), WORDS), min_size=1, max_size=3),
    st.integers(20, 400),
)
def test_no_cut_falls_into_an_images_block(name: str, exchanges: list[tuple[list[str], str]], max_tokens: int) -> None:
    contents = [said for pieces, answer in exchanges for said in ("<image>".join(pieces), answer)]
    count = sum(len(pieces) - 1 for pieces, _ in exchanges)
    record = parse(chat(*contents, images=[A] * count)) if count else parse(chat(*contents))
    processor = PROCESSORS[name]
    encoder = ConversationEncoder(processor, max_tokens)
    if all(not answer.strip() for _, answer in exchanges):
        return
    full = ConversationEncoder(processor, 5000).encode(record)
    assert full.input_ids.count(encoder.image_token_id) == 4 * count == sum(full.image_tokens)
    try:
        cut = encoder.encode(record)
    except DataError as error:
        assert error.reason in ("images longer than a row", "no supervised token")
        return
    assert len(cut.input_ids) == min(max_tokens, len(full.input_ids)) and cut.image_tokens == full.image_tokens
    tasks = [processor.tokenizer.convert_tokens_to_ids(token) for token in TASK_TOKENS]
    block = [encoder.image_token_id] * 4 + tasks
    starts = [i for i in range(len(cut.input_ids)) if cut.input_ids[i : i + BLOCK] == block]
    assert len(starts) == count
    assert all(label == -100 for at in starts for label in cut.labels[at : at + BLOCK])


def test_supervised_text_is_the_answers_whatever_stands_between() -> None:
    record = parse(chat("A <image>, B <image>?", "A.", "<image> and <image>", "B.", images=[A] * 4))
    encoded = ConversationEncoder(PROCESSORS["llama-3"], 5000).encode(record)
    assert supervised(PROCESSORS["llama-3"].tokenizer, encoded) == ["A.<|eot_id|>", "B.<|eot_id|>"]


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two images, text, one image, three images; the second image of the row behind these is lost, or cut."""
    monkeypatch.setenv("VISPER_CACHE", str(tmp_path / "cache"))
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 256, (12, 10, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "0.png").read_bytes()[:60])
    content = [
        row("Is <image> or <image>?", "A.", image=["0.png", "1.png"], id="two"),
        row("1 + 1?", "2", id="text"),
        row("<image>\nWhat?", "A cat.", image="2.png", id="one"),
        row("<image><image> Same?", "No.", "And <image>?", "Yes.", images=["3.png", "0.png", "3.png"], id="three"),
        row("<image> or <image>?", "A.", image=["1.png", "lost.png"], id="lost"),
        row("<image> or <image>?", "A.", image=["1.png", "cut.png"], id="cut"),
        row("<image> or <image>?", "A.", image=["1.png"], id="bad"),
    ]
    (tmp_path / "rows.json").write_text(json.dumps(content))
    return tmp_path / "rows.json"


def good(rows: Path) -> Any:
    return open_records([(rows, rows.parent)], DropList()).select(np.arange(4))


ENCODER = ConversationEncoder(make_processor(CHATML), 500)


def test_the_table_gives_back_the_records(rows: Path) -> None:
    drops = DropList()
    records = open_records([(rows, rows.parent)], drops)
    assert list(records) == read_records([(rows, rows.parent)], DropList())
    assert drops.counts() == {"images and tags differ": 1}
    assert records.num_images.tolist() == [2, 0, 1, 3, 2, 2]
    assert records.has_image.tolist() == [True, False, True, True, True, True]
    files = [str(folder / name) for _, _, folder, name in records.image_files()]
    assert files == [image.path for record in records for image in record.images]
    table = records.parts[0].table
    assert table.column("images").null_count == 3, "rows of one image and none have nothing there"


def test_batches_hold_every_image_in_order(rows: Path) -> None:
    dataset = ConversationDataset(good(rows), ENCODER)
    batch = collate(dataset, [0, 1, 2, 3])
    assert batch["image_rows"].tolist() == [0, 0, 2, 3, 3, 3]
    assert batch["image_tokens"].tolist() == [4] * 6
    files = [Image.open(rows.parent / f"{i}.png") for i in (0, 1, 2, 3, 0, 3)]
    pixels = torch.stack([student_pixels(dataset.image_processor, image) for image in files])
    assert torch.equal(normalized_pixels(dataset.image_processor, batch["pixel_values"]), pixels)
    assert torch.equal(
        batch["teacher_images"]["depth"], torch.stack([small_pixels(rgb_bytes(image)) for image in files])
    )
    per_row = (batch["input_ids"] == ENCODER.image_token_id).sum(1).tolist()
    assert per_row == [8, 0, 4, 12]


def test_stored_targets_come_one_an_image(rows: Path) -> None:
    def lookup(content: bytes) -> dict[str, torch.Tensor]:
        return {"seen": torch.frombuffer(bytearray(digest(content)), dtype=torch.uint8)}

    dataset = ConversationDataset(good(rows), ENCODER, lookup)
    batch = Collator(0)([dataset[i] for i in range(4)])
    digests = [digest((rows.parent / f"{i}.png").read_bytes()) for i in (0, 1, 2, 3, 0, 3)]
    assert [bytes(stored.tolist()) for stored in batch["teacher_images"]["seen"]] == digests


def test_lengths_count_every_image(rows: Path) -> None:
    dataset = ConversationDataset(good(rows), ENCODER)
    _, found = survey(dataset.records, ENCODER, DropList())
    samples = [dataset[i] for i in range(4)]
    assert found.lengths.tolist() == [len(sample.input_ids) for sample in samples if isinstance(sample, Sample)]


def test_a_row_with_one_bad_image_is_a_drop(rows: Path) -> None:
    records = open_records([(rows, rows.parent)], DropList())
    drops = DropList()
    assert len(survey(records, ENCODER, drops)[0]) == 5
    assert [(drop.reason, drop.sample_id) for drop in drops] == [("missing image", "rows/4/lost")]
    dataset = ConversationDataset(records, ENCODER)
    lost, cut = [item for item in map(dataset.__getitem__, range(6)) if isinstance(item, Drop)]
    assert (lost.sample_id, lost.reason) == ("rows/4/lost", "missing image") and "lost.png" in lost.detail
    assert (cut.sample_id, cut.reason) == ("rows/5/cut", "broken image") and "cut.png" in cut.detail


def test_the_check_looks_at_every_image_of_a_row(rows: Path) -> None:
    report = check_file(rows, rows.parent, ENCODER)
    assert report.drops.counts() == {"images and tags differ": 1, "missing image": 1, "broken image": 1}
    total = report.counts["total"]
    assert (total["rows"], total["images"], total["images present"], total["unusable"]) == (7, 6, 5, 3)
    assert total["several images"] == 4


def test_every_image_has_a_digest(rows: Path) -> None:
    records = good(rows)
    found = digests_of(records)
    assert list(found) == [(0, 0), (0, 1), (2, 0), (3, 0), (3, 1), (3, 2)]
    assert all(digest(contents_of(records, index)[number] or b"") == own for (index, number), own in found.items())


def test_rows_come_back_from_parquet(rows: Path, tmp_path: Path) -> None:
    records, drops = open_records([(rows, rows.parent)], DropList()), DropList()
    write_parquet(records, tmp_path / "out", drops)
    assert drops.counts() == {"missing image": 1}
    read = open_records([Source(parquet=f"{tmp_path}/out/*.parquet")], drops)
    by_name = {record.id.split("/")[-1]: (i, record) for i, record in enumerate(records)}
    assert len(read) == 5
    for index, record in enumerate(read):
        at, original = by_name[record.id.split("/")[-1]]
        assert record.turns == original.turns
        assert [image.path for image in record.images] == [Path(image.path).name for image in original.images]
        assert [(image.turn, image.at) for image in record.images] == [(i.turn, i.at) for i in original.images]
        assert contents_of(read, index) == contents_of(records, at)
    assert sorted(map(str, digests_of(read).values())) == sorted(
        str(own) for (row, _), own in digests_of(records).items() if row != 4
    )


def test_columns_of_image_lists_become_samples(rows: Path, tmp_path: Path) -> None:
    import datasets

    held = [{"bytes": (rows.parent / f"{i}.png").read_bytes(), "path": None} for i in range(4)]
    words, image = datasets.Value("string"), datasets.Image()
    features = datasets.Features({"messages": [{"role": words, "content": words}], "images": [image], "image": image})
    said = [chat("<image> or <image>?", "A.")["messages"], chat("Is it <image>?", "B.")["messages"]]
    images, single = [held[:2], [held[2]], [held[3]], []], [None, None, held[0], held[1]]
    data = {"messages": said * 2, "images": images, "image": single}
    datasets.Dataset.from_dict(data, features=features).save_to_disk(str(tmp_path / "saved"))
    drops = DropList()
    records = open_records([Source(hf=str(tmp_path / "saved"))], drops)
    assert records.num_images.tolist() == [2, 1, 2, 1] and not len(drops)
    shown = [contents_of(records, i) for i in range(4)]
    assert shown == [[held[i]["bytes"] for i in row] for row in ([0, 1], [2], [0, 3], [1])]
    sample = ConversationDataset(records, ENCODER)[2]
    assert isinstance(sample, Sample) and sample.pixel_values is not None and len(sample.pixel_values) == 2


def test_a_chat_whose_images_do_not_match_the_tags_ends_before_the_model_is_loaded(rows: Path) -> None:
    image = str(rows.parent / "0.png")
    done = CliRunner().invoke(app, ["chat", "no/model", "--prompt", "Same?", "--image", image, "--image", image])
    assert "images: 2, tags '<image>' and image parts: 0" in str(done.exception)
