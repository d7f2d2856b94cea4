"""Rows become batches; a bad row is left out and named, and neither stops the run nor shifts other rows."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from tests.conftest import outside
from tests.data.rows.test_records import survey
from tests.data.test_chat import CHATML, make_processor
from tests.records import records_of
from tests.vlms import PROCESSORS
from visper.common.errors import DataError
from visper.data.chat import IGNORED, ConversationEncoder
from visper.data.collator import Batch, Collator, Sample
from visper.data.dataset import ConversationDataset, require_images
from visper.data.images import squashed, with_geometry
from visper.data.rows.records import Drop, DropList, Record, ShownImage, Turn
from visper.data.rows.sources import open_records
from visper.data.rows.table import Records
from visper.data.sampler import RowSampler
from visper.data.vlm import encoder_for


def small_pixels(image: torch.Tensor) -> torch.Tensor:
    """A teacher's preprocessing."""
    return squashed(image, (4, 4)).float() / 255


def conversation(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.fixture
def records(tmp_path: Path) -> Records:
    """Image, text, missing image, truncated image, empty answer, image."""
    for i, name in enumerate(("a.jpg", "b.jpg", "cut.jpg")):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (60, 90, 3), dtype=np.uint8)).save(tmp_path / name)
    whole = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    rows: list[dict[str, Any]] = [
        {"id": 0, "image": "a.jpg", "conversations": conversation("<image>\nWhat?", "A cat.")},
        {"id": 1, "conversations": conversation("1 + 1?", "2")},
        {"id": 2, "image": "lost.jpg", "conversations": conversation("<image>\nWhat?", "A dog.")},
        {"id": 3, "image": "cut.jpg", "conversations": conversation("<image>\nWhat?", "A dog.")},
        {"id": 4, "conversations": conversation("Well?", "")},
        {"id": 5, "image": "b.jpg", "conversations": conversation("What do you see?\n<image>", "A tree.")},
    ]
    (tmp_path / "mix.json").write_text(json.dumps(rows))
    return open_records([(tmp_path / "mix.json", tmp_path)], DropList())


@pytest.fixture
def encoder() -> ConversationEncoder:
    return ConversationEncoder(make_processor(CHATML), 500)


@pytest.fixture
def dataset(records: Records, encoder: ConversationEncoder) -> ConversationDataset:
    return ConversationDataset(records, encoder)


def collate(dataset: ConversationDataset, rows: list[int], teachers: bool = True) -> Batch:
    return Collator(0, {"depth": small_pixels} if teachers else {})([dataset[i] for i in rows])


def test_a_batch_pads_right_and_has_pixels_for_its_images_alone(dataset: ConversationDataset) -> None:
    batch = collate(dataset, [1, 0, 5])
    assert batch["image_rows"].tolist() == [1, 2]
    assert batch["pixel_values"].shape == (2, 3, 8, 8)
    assert batch["teacher_images"]["depth"].shape == (2, 3, 4, 4)
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    for row, (index, length) in enumerate(zip([1, 0, 5], lengths, strict=True)):
        sample = dataset[index]
        assert isinstance(sample, Sample)
        assert batch["input_ids"][row, :length].tolist() == sample.input_ids
        assert batch["labels"][row, :length].tolist() == sample.labels
        assert (batch["labels"][row, length:] == IGNORED).all() and (batch["input_ids"][row, length:] == 0).all()
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (max(lengths) - length)
    assert [name.split("/")[1] for name in batch["sample_ids"]] == ["1", "0", "5"]


def test_a_text_batch_has_no_pixels(dataset: ConversationDataset) -> None:
    batch = collate(dataset, [1])
    assert "pixel_values" not in batch and "teacher_images" not in batch
    assert batch["image_rows"].shape == (0,) and batch["image_rows"].dtype == torch.long


def test_a_batch_without_teachers_has_no_teacher_images(dataset: ConversationDataset) -> None:
    assert "teacher_images" not in collate(dataset, [0], teachers=False)


def test_bad_rows_are_left_out_and_named(dataset: ConversationDataset) -> None:
    batch = collate(dataset, [0, 2, 3, 4, 1])
    assert [drop.reason for drop in batch["dropped"]] == ["missing image", "broken image", "no supervised token"]
    assert len(batch["sample_ids"]) == len(batch["input_ids"]) == 2
    assert batch["image_rows"].tolist() == [0]


def test_a_batch_of_bad_rows_alone_is_one_unsupervised_token(dataset: ConversationDataset) -> None:
    batch = collate(dataset, [2, 4])
    assert len(batch["dropped"]) == 2
    assert batch["input_ids"].tolist() == [[0]] and batch["attention_mask"].tolist() == [[1]]
    assert batch["labels"].tolist() == [[IGNORED]]
    assert "pixel_values" not in batch


def test_the_geometry_is_the_processors(records: Records, encoder: ConversationEncoder) -> None:
    encoder.processor.image_processor = with_geometry(encoder.processor.image_processor, "pad")
    sample = ConversationDataset(records, encoder)[0]
    assert isinstance(sample, Sample)
    (image,) = sample.seen
    assert image.shape == (3, 90, 90) and image[:, 0, 0].tolist() == [127, 127, 127]


def test_an_image_over_the_limit_is_a_drop(records: Records, encoder: ConversationEncoder) -> None:
    image = ConversationDataset(records, encoder)[0]
    assert isinstance(image, Sample)
    pixels = image.seen[0][0].numel()
    assert isinstance(ConversationDataset(records, encoder, max_pixels=pixels)[0], Sample)
    dropped = ConversationDataset(records, encoder, max_pixels=pixels - 1)[0]
    assert isinstance(dropped, Drop) and dropped.reason == "huge image" and f"{pixels - 1:,}" in dropped.detail


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_change_nothing(dataset: ConversationDataset, workers: int) -> None:
    def batches(num_workers: int) -> list[Batch]:
        sampler = RowSampler(len(dataset), seed=3)
        loader: DataLoader[Any] = DataLoader(
            dataset, 2, sampler=sampler, num_workers=num_workers, collate_fn=Collator(0, {"depth": small_pixels})
        )
        return list(loader)

    for ours, alone in zip(batches(workers), batches(0), strict=True):
        assert ours["sample_ids"] == alone["sample_ids"] and ours["dropped"] == alone["dropped"]
        assert torch.equal(ours["input_ids"], alone["input_ids"])


def test_dataset_and_collator_can_be_sent_to_a_spawned_worker(dataset: ConversationDataset) -> None:
    again = pickle.loads(pickle.dumps(dataset))
    collator = pickle.loads(pickle.dumps(Collator(0, {"depth": small_pixels})))
    assert torch.equal(collator([again[0]])["pixel_values"], collate(dataset, [0])["pixel_values"])


def test_the_survey_finds_bad_rows_before_the_first_step(records: Records, encoder: ConversationEncoder) -> None:
    drops = DropList()
    good, found = survey(records, encoder, drops)
    assert drops.counts() == {"missing image": 1, "no supervised token": 1}  # not the broken image: none is decoded
    assert len(good) == len(found.lengths) == 6 - len(drops)
    dataset = ConversationDataset(good, encoder)
    kept = [(dataset[i], length) for i, length in enumerate(found.lengths)]
    assert all(isinstance(item, Drop) or len(item.input_ids) == length for item, length in kept)


def test_cut_rows_are_counted(records: Records, tmp_path: Path) -> None:
    long = Record("long", (records[1].turns[0], Turn("assistant", "word " * 200)))
    encoder, both = ConversationEncoder(make_processor(CHATML), 100), records_of(tmp_path, [long, records[1]])
    assert survey(both, encoder, DropList())[1].truncated.tolist() == [True, False]
    dataset = ConversationDataset(both, encoder)
    assert collate(dataset, [0, 1])["num_truncated"] == 1


def test_rows_that_show_an_image_are_known(records: Records) -> None:
    assert records.has_image.tolist() == [True, False, True, True, False, True]


@pytest.mark.parametrize("name", ["pretrain.json", "instruct.json"])
def test_real_photographs_pass(name: str, encoder: ConversationEncoder) -> None:
    folder = outside("photos")
    drops = DropList()
    records = open_records([(folder / name, folder)], drops)
    encoder.max_tokens = 4096
    good, _ = survey(records, encoder, drops)
    assert len(drops) == 0
    dataset = ConversationDataset(good, encoder)
    rows = list(range(0, len(dataset), 40))
    batch = collate(dataset, rows)
    assert len(batch["sample_ids"]) == len(rows) and not batch["dropped"]
    assert len(batch["pixel_values"]) == dataset.records.has_image[rows].sum()


def test_rows_without_any_image_are_refused_where_images_are_trained(records: Records) -> None:
    require_images(records)
    with pytest.raises(DataError, match="none of the 2 rows has an image"):
        require_images(records.select(np.array([1, 4])))


@pytest.mark.parametrize(("size", "fits"), [((8, 8), True), ((640, 480), False)])
def test_a_row_is_too_long_only_by_the_true_sizes_of_its_images(
    size: tuple[int, int], fits: bool, tmp_path: Path
) -> None:
    """The check before the first step does not open images: it takes each as 640 x 480 pixels."""
    Image.new("RGB", size).save(tmp_path / "a.png")
    shown = tuple(ShownImage(str(tmp_path / "a.png"), 0) for _ in range(8))
    row = Record("r", (Turn("user", "Which is it?"), Turn("assistant", "None.")), shown)
    encoder = encoder_for(PROCESSORS["qwen3_vl"](), 100)
    records, found = survey(records_of(tmp_path, [row]), encoder, DropList())
    assert found.lengths.tolist() == [100] and found.truncated.all()
    item = ConversationDataset(records, encoder)[0]
    assert isinstance(item, Sample) if fits else isinstance(item, Drop) and item.reason == "images longer than a row"
