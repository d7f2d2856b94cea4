"""Rows about one image share a micro-batch; an epoch has every row once, and the split changes no step."""

import itertools
import json
from collections import Counter

import pytest
import torch

from tests import tiny
from tests.records import records_of
from visper.config import Source
from visper.data.image_order import fill_micro_batches, image_groups, side_by_side
from visper.data.rows.parquet import write_parquet
from visper.data.rows.records import DropList, Record, ShownImage, Turn
from visper.data.rows.sources import open_records
from visper.data.sampler import Mixture, RowSampler

GROUPS = torch.randint(0, 60, (200,), generator=torch.Generator().manual_seed(0)).tolist()


def record(name, image):
    images = () if image is None else (ShownImage(image, 0),)
    return Record(name, (Turn("user", "?"), Turn("assistant", "!")), images)


def epoch(number=0, **options):
    sampler = RowSampler(200, seed=3, groups=GROUPS, **options)
    sampler.set_epoch(number)
    return list(sampler)


def steps(rows, size):
    return [rows[at : at + size] for at in range(0, len(rows), size)]


def test_rows_of_one_image_have_one_number_and_rows_without_an_image_their_own(tmp_path):
    named = [record("a", "x"), record("b", None), record("c", "y"), record("d", "x"), record("e", None)]
    numbers = image_groups(records_of(tmp_path, named))
    assert numbers[0] == numbers[3] and len(set(numbers.tolist())) == 4


@pytest.mark.parametrize("embedded", [False, True], ids=["files", "parquet"])
def test_rows_of_sources_are_grouped_within_each(tmp_path, embedded):
    folder = tiny.write_rows(tmp_path / "rows", images=6, text_rows=2)
    rows = json.loads((folder / "rows.json").read_text())
    for number, row in enumerate(rows[:6]):
        row["image"] = f"{number // 2}.png"
    (folder / "rows.json").write_text(json.dumps(rows))
    source = Source(json_file=str(folder / "rows.json"), images=str(folder / "images"))
    if embedded:
        write_parquet(open_records([source], DropList()), tmp_path / "out", DropList())
        source = Source(parquet=f"{tmp_path}/out/*.parquet")
    records = open_records([source, source], DropList())
    groups = image_groups(records)
    expected = [(record.id.split("/")[0], record.images[0].path if record.images else record.id) for record in records]
    pairs = list(itertools.combinations(range(16), 2))
    assert [groups[a] == groups[b] for a, b in pairs] == [expected[a] == expected[b] for a, b in pairs]
    assert len(set(groups.tolist())) == 2 * (3 + 2)


def test_a_group_stands_where_its_lowest_row_stood():
    order = torch.tensor([5, 0, 3, 1, 4, 2])
    groups = torch.tensor([0, 1, 1, 2, 0, 1])
    assert side_by_side(order, groups).tolist() == [0, 4, 3, 5, 1, 2]


def test_a_group_is_as_early_as_a_single_row_on_average():
    places = [epoch(number).index(GROUPS.index(max(GROUPS, key=GROUPS.count))) for number in range(300)]
    # 99.5 for a uniform place; the mean of 300 has a standard deviation of 3.3.
    assert abs(sum(places) / 300 - 99.5) < 12


def test_a_row_that_an_epoch_has_twice_goes_to_two_groups():
    order = torch.tensor([1, 0, 1, 2, 0])
    found = side_by_side(order, torch.zeros(3, dtype=torch.long)).tolist()
    assert Counter(found) == Counter(order.tolist())
    assert sorted(found[:3]) == [0, 1, 2] or sorted(found[2:]) == [0, 1, 2]


@pytest.mark.parametrize("options", [{}, {"lengths": [n % 17 for n in range(200)], "has_image": [True] * 200}])
def test_an_epoch_holds_every_row_once_and_images_stay_together(options):
    rows = epoch(2, global_batch=16, micro_batch=8, **options)
    assert sorted(Counter(rows).values()) == [1] * 192 + [2] * 8, "the last batch is filled up from the start"
    images = sum(len({GROUPS[row] for row in own}) for own in steps(rows, 8))
    apart = sum(len({GROUPS[row] for row in own}) for own in steps(list(RowSampler(200, seed=3, global_batch=8)), 8))
    # 60 images would be the least without any limit; a shuffle reads about one a row.
    assert images < 100 < 180 < apart


def test_a_step_has_the_same_rows_for_every_micro_batch():
    expected = [sorted(step) for step in steps(epoch(1, global_batch=16, micro_batch=16), 16)]
    for micro_batch in (1, 2, 4, 8):
        assert [sorted(step) for step in steps(epoch(1, global_batch=16, micro_batch=micro_batch), 16)] == expected


def test_a_micro_batch_holds_groups_that_fit_undivided():
    groups = [0, 0, 0, 1, 1, 2, 2, 3]
    assert [{groups[r] for r in own} for own in steps(fill_micro_batches(range(8), groups, 4), 4)] == [{0, 3}, {1, 2}]
    assert Counter(fill_micro_batches(range(8), [0] * 8, 4)) == Counter(range(8)), "larger than a micro-batch"


def test_a_mixture_has_the_rows_it_has_without_groups():
    mixture = Mixture(torch.arange(2).repeat_interleave(100), (2.5, 0.3))
    for number in range(3):
        plain = RowSampler(200, seed=3, mixture=mixture, global_batch=4)
        plain.set_epoch(number)
        assert Counter(epoch(number, mixture=mixture, global_batch=4, micro_batch=4)) == Counter(list(plain))


def test_without_groups_the_order_is_what_it_was():
    assert list(RowSampler(50, seed=1, micro_batch=8)) == list(RowSampler(50, seed=1))
