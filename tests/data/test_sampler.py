"""The order of rows depends on seed and epoch alone, and groups similar rows."""

from collections import Counter

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from visper.common.errors import DataError
from visper.data.sampler import Mixture, RowSampler


def order(sampler: RowSampler, epoch: int = 0) -> list[int]:
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 7, 64])
def test_every_epoch_holds_every_row_once(rows: int, grouped: bool) -> None:
    lengths = [i % 5 for i in range(rows)] if grouped else None
    sampler = RowSampler(rows, lengths=lengths, has_image=[i % 3 == 0 for i in range(rows)], global_batch=4)
    found = order(sampler, 3)
    assert sorted(found[:rows]) == list(range(rows)) and len(found) == len(sampler) == -(-rows // 4) * 4
    assert found[rows:] == found[: len(found) - rows], "the last batch is filled up from the start"


def test_order_is_a_function_of_seed_and_epoch() -> None:
    torch.manual_seed(1)
    first = order(RowSampler(50, seed=4), epoch=2)
    torch.manual_seed(2)
    assert order(RowSampler(50, seed=4), epoch=2) == first
    assert order(RowSampler(50, seed=4), epoch=3) != first
    assert order(RowSampler(50, seed=5), epoch=2) != first


def test_whole_groups_hold_one_modality_and_similar_lengths() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 1000, (403,), generator=generator).tolist()
    has_image = [i % 4 != 0 for i in range(403)]
    rows = order(RowSampler(403, lengths=lengths, has_image=has_image, global_batch=8))
    groups = [rows[i : i + 8] for i in range(0, 403 - 16, 8)]
    assert all(len({has_image[i] for i in group}) == 1 for group in groups)
    spread = [max(lengths[i] for i in group) - min(lengths[i] for i in group) for group in groups]
    # 8 of some 100 to 300 sorted lengths: a shuffle's groups would spread over some 800 of the 1000.
    assert sum(spread) / len(spread) < 100


@pytest.mark.parametrize("image", [True, False])
def test_one_modality_alone_is_grouped_too(image: bool) -> None:
    rows = order(RowSampler(20, lengths=list(range(20)), has_image=[image] * 20, global_batch=4))
    assert sorted(rows) == list(range(20))


def test_lengths_of_another_dataset_are_refused() -> None:
    with pytest.raises(ValueError, match="3 entries for 4 rows"):
        RowSampler(4, lengths=[1, 2, 3])


@pytest.mark.parametrize("rows", [3, 13])
def test_every_step_has_the_same_rows_however_the_batch_is_split(rows):
    def steps(processes, micro_batch, skip=0):
        sampler = RowSampler(rows, seed=5, global_batch=4)
        sampler.set_epoch(2)
        batches = BatchSampler(sampler, micro_batch, drop_last=False)
        shares = [list(BatchSamplerShard(batches, processes, process)) for process in range(processes)]
        a_step = 4 // processes // micro_batch  # micro-batches of one process
        assert len({len(share) for share in shares}) == 1, "a process would run out of rows"
        starts = range(skip * a_step, len(shares[0]), a_step)
        return [sorted(row for share in shares for own in share[at : at + a_step] for row in own) for at in starts]

    one = steps(1, 4)
    assert all(len(step) == 4 for step in one) and {row for step in one for row in step} == set(range(rows))
    for processes, micro_batch in ((1, 2), (1, 1), (2, 2), (2, 1), (4, 1)):
        assert steps(processes, micro_batch) == one
        assert steps(processes, micro_batch, skip=1) == one[1:], "continued behind the first step"


SIZES, WEIGHTS = (10, 8, 40), (2.0, 1.25, 0.25)
MIXTURE = Mixture(torch.arange(3).repeat_interleave(torch.tensor(SIZES)), WEIGHTS)


def mixed(**options) -> RowSampler:
    return RowSampler(sum(SIZES), seed=3, mixture=MIXTURE, **options)


def test_a_weight_is_how_often_a_row_is_seen() -> None:
    epochs = [order(mixed(), epoch) for epoch in range(4)]
    assert [len(rows) for rows in epochs] == [len(mixed())] * 4 == [20 + 10 + 10] * 4
    for rows in epochs:
        seen = Counter(rows)
        assert [seen[row] for row in range(10)] == [2] * 10
        assert sorted(seen[row] for row in range(10, 18)) == [1] * 6 + [2] * 2
        assert sorted(seen[row] for row in range(18, 58)) == [0] * 30 + [1] * 10
    total = Counter(row for rows in epochs for row in rows)
    assert [total[row] for row in range(58)] == [8] * 10 + [5] * 8 + [1] * 40, "another part in each epoch"


def test_a_mixture_is_a_function_of_seed_and_epoch() -> None:
    assert order(mixed(), 2) == order(mixed(), 2) != order(mixed(), 3)
    sets = [set(order(RowSampler(58, seed=seed, mixture=MIXTURE))) for seed in (0, 1)]
    assert sets[0] != sets[1]


def test_weights_of_one_change_nothing() -> None:
    ones = Mixture(MIXTURE.sources, (1.0, 1.0, 1.0))
    for epoch in range(3):
        rows = order(RowSampler(58, mixture=ones), epoch)
        assert sorted(rows) == list(range(58))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_mixture_is_grouped_by_length_and_split_like_any_rows(processes: int) -> None:
    lengths, has_image = [(7 * row) % 58 for row in range(58)], [row % 3 > 0 for row in range(58)]
    options = {"lengths": lengths, "has_image": has_image, "global_batch": 4}
    plain, grouped = order(mixed(global_batch=4), 1), order(mixed(**options), 1)
    assert Counter(grouped) == Counter(plain), "grouping moves rows, and changes none"
    batches = BatchSampler(grouped, 4 // processes, drop_last=False)
    shares = [list(BatchSamplerShard(batches, processes, process)) for process in range(processes)]
    steps = [[row for share in shares for row in share[at]] for at in range(len(shares[0]))]
    assert steps == [grouped[at : at + 4] for at in range(0, 40, 4)]
    assert sum(len({has_image[row] for row in step}) == 1 for step in steps) >= len(steps) - 2


def test_a_weight_that_leaves_no_row_is_refused() -> None:
    with pytest.raises(DataError, match=r"0.01 of the 10 rows of source 1 .* at least 0.1"):
        Mixture(torch.zeros(10, dtype=torch.long), (0.01,))
