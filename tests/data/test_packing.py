"""Packing: every sample once and complete, images in order, boundaries never supervised."""

import pickle

import torch

from visper.data.chat import IGNORED
from visper.data.collator import Collator, Sample
from visper.data.packing import PackingCollator
from visper.data.rows.records import Drop

PAD = 9
PACKED = PackingCollator(Collator(PAD))


def sample(number: int, length: int, images: int = 0) -> Sample:
    """Tokens ``100 * number, ...``, all of them supervised; pixels of each image filled with the number."""
    ids = [100 * number + i for i in range(length)]
    pixels = torch.full((images, 3, 2, 2), float(number)) if images else None
    return Sample(str(number), ids, list(ids), tuple(range(1, images + 1)), pixels)


def test_samples_lie_whole_behind_each_other_and_positions_start_again():
    batch = PACKED([sample(1, 3), sample(2, 2), sample(3, 4)])
    assert batch["input_ids"].tolist() == [[100, 101, 102, 200, 201, 300, 301, 302, 303]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 3]]
    assert batch["labels"].tolist() == [[-100, 101, 102, -100, 201, -100, 301, 302, 303]]
    assert batch["attention_mask"].all() and batch["attention_mask"].shape == (1, 9)
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 3, 5, 9]
    assert batch["max_length_q"] == batch["max_length_k"] == 4
    assert batch["sample_ids"] == ["1", "2", "3"]


def test_as_many_labels_count_as_without_packing():
    samples = [sample(i, n) for i, n in enumerate((5, 3, 8, 1, 2))]
    counts = {int((made["labels"][:, 1:] != IGNORED).sum()) for made in (Collator(PAD)(samples), PACKED(samples))}
    assert len(counts) == 1


def test_images_keep_the_order_of_their_tokens_and_bad_rows_their_names():
    batch = PACKED([sample(1, 2, images=1), sample(2, 9), Drop("bad", "lost"), sample(3, 8, images=2)])
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [1, 3, 3]
    assert batch["image_rows"].tolist() == [0, 0, 0], "all in the one row, and still three images"
    assert batch["image_tokens"].tolist() == [1, 1, 2]
    assert [drop.sample_id for drop in batch["dropped"]] == ["bad"]


def test_a_batch_of_bad_rows_alone_is_still_a_batch():
    batch = PACKED([Drop("bad", "lost")])
    assert batch["input_ids"].tolist() == [[PAD]] and batch["cu_seq_lens_q"].tolist() == [0, 1]
    assert not len(batch["image_rows"])


def test_it_travels_to_loader_processes():
    assert pickle.loads(pickle.dumps(PACKED)) == PACKED
