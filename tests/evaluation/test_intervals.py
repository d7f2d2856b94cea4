import pytest

from visper.evaluation import wilson


def test_known_interval():
    # 81 of 263 with z = 1.96 (Newcombe 1998, table I): 0.2553 to 0.3662.
    low, high = wilson(81, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)


def test_stays_inside_the_unit_interval():
    assert wilson(0, 10)[0] == 0.0
    assert 0.999999 < wilson(10, 10)[1] <= 1.0


@pytest.mark.parametrize(("correct", "total"), [(1, 0), (3, 2), (-1, 4)])
def test_impossible_shares_are_refused(correct, total):
    with pytest.raises(ValueError, match="no share"):
        wilson(correct, total)
