"""Findings beside their controls, and the ablation's arithmetic."""

import pytest
import torch

from visper.evaluation.probe.measures import centered_cosine
from visper.quickstart.ablate import Difference, ablate, differences, t_quantile


def test_the_common_layout_earns_no_cosine():
    mean = torch.randn(5, 4) * 10
    own, other = torch.randn(30, 5, 4), torch.randn(30, 5, 4)
    plain = torch.nn.functional.cosine_similarity((other + mean).flatten(1), (own + mean).flatten(1)).mean()
    assert plain > 0.9, "this is what an uncentered cosine would report for an unrelated prediction"
    assert abs(centered_cosine(other + mean, own + mean, mean).mean()) < 0.2
    assert centered_cosine(own + mean, own + mean, mean).tolist() == pytest.approx([1.0] * 30)


def test_differences_are_paired_by_seed():
    ours, baseline = [{"depth": 0.9}, {"depth": 0.6}, {"depth": 0.8}], [{"depth": 0.8}, {"depth": 0.5}, {"depth": 0.7}]
    (found,) = differences("arm", ours, baseline)
    assert found == Difference("arm", "depth", pytest.approx(10), pytest.approx(10), pytest.approx(10))


def test_the_interval_is_students():
    ours, baseline = [{"k": 0.02}, {"k": 0.04}], [{"k": 0.0}, {"k": 0.0}]
    (found,) = differences("arm", ours, baseline)
    # points 2 and 4: mean 3, standard error 1, t(1 degree of freedom) = 12.7062047
    assert (found.mean, found.low, found.high) == pytest.approx((3, 3 - 12.7062047, 3 + 12.7062047))


def test_one_seed_makes_no_claim(tmp_path):
    with pytest.raises(ValueError, match="at least 2"):
        ablate(tmp_path, seeds=1)


@pytest.mark.parametrize(("freedom", "quantile"), [(1, 12.706), (10, 2.228), (11, 2.201), (30, 2.042)])
def test_quantiles_are_those_of_the_tables(freedom, quantile):
    assert t_quantile(freedom) == pytest.approx(quantile, abs=5e-4)
