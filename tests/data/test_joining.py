"""Joined conversations: the shared prefix once, every branch once, positions that continue from the prefix."""

import pickle
from dataclasses import replace

import pytest
import torch

from visper.data.chat import IGNORED
from visper.data.collator import Collator, Sample
from visper.data.joining import JoiningCollator, join
from visper.data.packing import PackingCollator
from visper.data.rows.records import Drop

IMAGE, PAD = 7, 0
COLLATOR = JoiningCollator(Collator(PAD), IMAGE, 100)


def sample(name, ids, supervised=1, image=1):
    """The last ``supervised`` tokens are supervised; pixels are filled with ``image``."""
    labels = [IGNORED] * (len(ids) - supervised) + ids[len(ids) - supervised :]
    if image is None:
        return Sample(name, ids, labels)
    return Sample(name, ids, labels, (ids.count(IMAGE),), torch.full((1, 3, 2, 2), float(image)))


ONE, TWO = sample("one", [1, IMAGE, IMAGE, 2, 30, 31, 32]), sample("two", [1, IMAGE, IMAGE, 2, 40, 41], 1)


def test_the_prefix_stands_once_and_each_branch_continues_its_positions():
    batch = COLLATOR([ONE, TWO, sample("text", [1, 50], image=None)])
    assert batch["input_ids"].tolist() == [[1, IMAGE, IMAGE, 2, 30, 31, 32, 40, 41, 1, 50]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 4, 5, 0, 1]]
    assert batch["branches"].tolist() == [[0, 0, 0, 0, 1, 1, 1, 2, 2, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED] * 6 + [32, IGNORED, 41, IGNORED, 50]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 9, 11]
    assert batch["sample_ids"] == ["one", "two", "text"], "all members are named"
    assert batch["image_rows"].tolist() == [0] and len(batch["pixel_values"]) == 1


def test_nothing_to_join_is_a_packed_row():
    samples = [ONE, sample("other", TWO.input_ids, image=2), sample("text", [1, 50], image=None)]
    joined, packed = COLLATOR(samples), PackingCollator(Collator(PAD))(samples)
    assert not joined.pop("branches").any() and joined.pop("prefixes") == packed["lengths"]
    assert joined.keys() == packed.keys() and joined.pop("sizes") == packed.pop("sizes")
    assert all(torch.equal(torch.as_tensor(joined[k]), torch.as_tensor(packed[k])) for k in packed if "ids" not in k)


@pytest.mark.parametrize(
    "other",
    [
        sample("other pixels", TWO.input_ids, image=2),
        sample("no image", [1, 2, 40, 41], image=None),
        sample("text before the image", [1, 9, IMAGE, IMAGE, 2, 40, 41]),
        sample("another image later", [1, IMAGE, IMAGE, 2, IMAGE, 41]),
    ],
    ids=lambda other: other.id,
)
def test_what_shares_no_image_prefix_stays_apart(other):
    for pair in ([ONE, other], [other, ONE]):
        assert [len(joined.members) for joined in join(pair, IMAGE, 100)] == [1, 1]


def test_equal_questions_are_shared_but_never_a_supervised_token_or_what_predicts_one():
    question = [1, IMAGE, 2, 30, 31]
    rows = [sample("a", [*question, 60, 61], 2), sample("b", [*question, 60, 62], 2)]
    (joined,) = join(rows, IMAGE, 100)
    assert joined.prefix == 4, "31 predicts the supervised 60 in both rows, so that it stands in both branches"
    batch = COLLATOR(rows)
    assert batch["input_ids"].tolist() == [[1, IMAGE, 2, 30, 31, 60, 61, 31, 60, 62]]
    assert batch["labels"][0].tolist() == [IGNORED] * 5 + [60, 61, IGNORED, 60, 62]


def test_a_third_member_may_shorten_the_prefix():
    rows = [sample(str(i), [1, IMAGE, 2, *rest]) for i, rest in enumerate(([5, 6, 8], [5, 6, 9], [5, 10]))]
    (joined,) = join(rows, IMAGE, 100)
    assert [pair.prefix for pair in join(rows[:2], IMAGE, 100)] == [4]
    assert joined.sample().input_ids == [1, IMAGE, 2, 5, 6, 8, 5, 6, 9, 5, 10]


def test_a_joined_sample_longer_than_max_tokens_is_split():
    rows = [sample(str(i), [1, IMAGE, 2, 10 * i, 10 * i + 1]) for i in range(1, 5)]
    assert [len(joined.members) for joined in join(rows, IMAGE, 7)] == [2, 2]
    assert [len(joined.members) for joined in join(rows, IMAGE, 6)] == [1, 1, 1, 1]


def test_as_many_tokens_are_supervised_as_in_separate_rows():
    rows = [sample(str(i), [1, IMAGE, 2, *range(10, 12 + i)], 1 + i % 3, image=i // 3) for i in range(9)]
    counts = [int((made["labels"][:, 1:] != IGNORED).sum()) for made in (Collator(PAD)(rows), COLLATOR(rows))]
    assert counts[0] == counts[1] == sum(1 + i % 3 for i in range(9))


def test_bad_rows_are_passed_on_and_alone_make_a_batch():
    batch = COLLATOR([ONE, Drop("bad", "lost"), TWO])
    assert [drop.sample_id for drop in batch["dropped"]] == ["bad"] and batch["sample_ids"] == ["one", "two"]
    alone = COLLATOR([Drop("bad", "lost")])
    assert alone["input_ids"].tolist() == [[PAD]] and alone["sample_ids"] == ["none"]


def test_cut_rows_are_counted_each():
    rows = [replace(each, truncated=True) for each in (ONE, TWO)]
    assert COLLATOR(rows)["num_truncated"] == 2


def test_it_travels_to_loader_processes():
    assert pickle.loads(pickle.dumps(COLLATOR)) == COLLATOR


def test_rows_of_the_same_several_images_are_joined_behind_the_last():
    ids = [1, IMAGE, IMAGE, 5, IMAGE, IMAGE, 2]
    pixels = torch.randn(2, 3, 2, 2)
    rows = [Sample(str(i), [*ids, 10 + i, 20], [IGNORED] * 8 + [20], (2, 2), pixels) for i in range(2)]
    batch = COLLATOR(rows)
    assert batch["input_ids"].tolist() == [[*ids, 10, 20, 11, 20]]
    assert batch["image_tokens"].tolist() == [2, 2] and torch.equal(batch["pixel_values"], pixels)
    other = replace(rows[1], pixel_values=torch.cat([pixels[:1], torch.zeros(1, 3, 2, 2)]))
    assert len(join([rows[0], other], IMAGE, 100)) == 2
