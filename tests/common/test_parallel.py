"""Results come in the items' order, and the work leaves no trace in what is random."""

import pytest
import torch

from visper.common.parallel import in_order


def square(number: int) -> int:
    return number * number


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("count", [0, 1, 200])
def test_results_come_in_order(count: int, workers: int) -> None:
    assert list(in_order(square, range(count), "", quiet=True, workers=workers)) == [i * i for i in range(count)]


@pytest.mark.parametrize("workers", [0, 2])
def test_weights_drawn_afterwards_are_those_drawn_without(workers: int) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(in_order(square, range(10), "", quiet=True, workers=workers))
    assert torch.equal(torch.rand(3), expected)
