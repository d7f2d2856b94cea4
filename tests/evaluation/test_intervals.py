import random

import pytest

from visper.evaluation import wilson
from visper.evaluation.intervals import by_images, grouped, paired, t_quantile, wilson_grouped


def test_known_interval():
    # 81 of 263 with z = 1.96 (Newcombe 1998, table I): 0.2553 to 0.3662.
    low, high = wilson(81, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)


def test_stays_inside_the_unit_interval():
    assert wilson(0, 10)[0] == 0.0
    assert 0.999999 < wilson(10, 10)[1] <= 1.0


@pytest.mark.parametrize(("correct", "total"), [(1, 0), (3, 2), (-1, 4)])
def test_impossible_shares_are_refused(correct, total):
    with pytest.raises(ValueError, match="not a share"):
        wilson(correct, total)


def test_values_of_one_group_count_as_one_observation():
    # Three groups of two: sums less twice the mean 0.5 are 1, -1 and 0; sqrt(2 * 3 / 2) / 6 = 0.2887.
    # t of 2 degrees of freedom: 4.3027.
    mean, (low, high) = grouped([[1, 1], [0, 0], [1, 0]])
    assert (mean, low, high) == pytest.approx((0.5, 0.5 - 4.3027 * 0.2887, 0.5 + 4.3027 * 0.2887), abs=1e-3)
    # Copies of a value inside its group make nothing surer.
    assert grouped([[1] * 5, [0] * 5])[1] == pytest.approx(grouped([[1], [0]])[1])
    assert grouped([[1, 0]]) == (0.5, None)
    with pytest.raises(ValueError, match="at least one value"):
        grouped([])


@pytest.mark.parametrize("groups", [2, 3, 5, 30])
def test_a_95_percent_interval_holds_the_mean_95_times_in_100_also_for_few_groups(groups):
    """2,000 draws have a standard error of 0.5 points; the normal quantile holds 70, 82 and 88 % at 2, 3 and 5."""
    rng = random.Random(0)
    found = [grouped([[rng.gauss(0, 1)] for _ in range(groups)])[1] for _ in range(2000)]
    assert sum(low <= 0 <= high for low, high in found) / 2000 == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize(("images", "share"), [(200, 0.6), (10, 0.6), (20, 0.95)])
def test_an_interval_over_images_holds_the_share_however_alike_an_images_answers_are(images, share):
    """Five answers per image, of correlation 0.3: of 1,000 draws, ``wilson`` holds it in 791, 798 and 832."""
    rng, held = random.Random(0), 0
    for _ in range(1000):
        chances = [rng.betavariate(share * 7 / 3, (1 - share) * 7 / 3) for _ in range(images)]
        low, high = wilson_grouped([[float(rng.random() < chance) for _ in range(5)] for chance in chances])
        held += low <= share <= high
    assert held >= 930


def test_an_interval_over_images_is_wilsons_where_each_image_has_one_value():
    assert wilson_grouped([[1.0], [0.0], [0.5]]) == wilson(1.5, 3)
    # Nothing says how alike the values of an image are: each image counts once.
    assert wilson_grouped([[1.0] * 5, [1.0] * 5]) == wilson(2, 2)
    assert wilson_grouped([[1.0, 0.0]]) == wilson(0.5, 1)
    # Images that vary less than by chance do not make the values count more than once.
    assert wilson_grouped([[1.0, 0.0]] * 40) == wilson(40, 80, t_quantile(39))
    with pytest.raises(ValueError, match="not a share"):
        wilson_grouped([])


def test_questions_about_the_same_images_are_a_group_and_those_without_images_are_not():
    images = [("a", "b"), ("b", "a"), ("a",), (), ()]
    assert by_images([1, 2, 3, 4, 5], images) == [[1, 2], [3], [4], [5]]


def test_differences_are_paired_by_seed_and_their_interval_is_students():
    assert paired([0.9, 0.6, 0.8], [0.8, 0.5, 0.7]) == (pytest.approx(0.1), (pytest.approx(0.1), pytest.approx(0.1)))
    # 2 and 4: mean 3, standard error 1, t(1 degree of freedom) = 12.7062047
    mean, interval = paired([2, 4], [0, 0])
    assert (mean, *interval) == pytest.approx((3, 3 - 12.7062047, 3 + 12.7062047))
    with pytest.raises(ValueError, match="1 seeds give no interval: expected at least 2"):
        paired([1], [0])


@pytest.mark.parametrize(("freedom", "quantile"), [(1, 12.706), (10, 2.228), (11, 2.201), (30, 2.042)])
def test_quantiles_are_those_of_the_tables(freedom, quantile):
    assert t_quantile(freedom) == pytest.approx(quantile, abs=5e-4)
