import math

import pytest
import torch

from visper.distillation import info_nce_per_sample, smooth_l1_per_sample


def test_smooth_l1_by_hand():
    # Differences 0.5 (squared: 0.125) and 3 (linear: 2.5); 0 and 1 (both formulas: 0.5).
    predicted = torch.tensor([[[0.5, 3.0]], [[0.0, 1.0]]])
    losses = smooth_l1_per_sample(predicted, torch.zeros(2, 1, 2))
    torch.testing.assert_close(losses, torch.tensor([(0.125 + 2.5) / 2, 0.25]))


def test_smooth_l1_counts_each_sample_alone():
    predicted, target = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    alone = torch.cat([smooth_l1_per_sample(predicted[i : i + 1], target[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(smooth_l1_per_sample(predicted, target), alone)


def test_smooth_l1_is_float32_whatever_comes_in():
    assert smooth_l1_per_sample(torch.ones(1, 1, 2, dtype=torch.bfloat16), torch.zeros(1, 1, 2)).dtype == torch.float32


def test_smooth_l1_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"\(2, 3, 4\).*\(2, 3, 5\)"):
        smooth_l1_per_sample(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5))


def test_info_nce_by_hand():
    # Cosines with the pool (1, 0), (0, 1), (-1, 0) are 0.6, 0.8, -0.6 whatever the vectors' lengths; factor e^1.
    predicted = torch.tensor([[[3.0, 4.0]]])
    pool = torch.tensor([[[2.0, 0.0]], [[0.0, 0.5]], [[-7.0, 0.0]]])
    loss = info_nce_per_sample(predicted, pool, torch.tensor([1]), torch.tensor(1.0))
    exponents = [math.exp(math.e * cosine) for cosine in (0.6, 0.8, -0.6)]
    assert loss.item() == pytest.approx(-math.log(exponents[1] / sum(exponents)), abs=1e-6)


def test_info_nce_gives_gradient_to_prediction_and_scale_not_to_the_pool():
    predicted, pool = torch.randn(2, 3, 4, requires_grad=True), torch.randn(5, 3, 4, requires_grad=True)
    scale = torch.tensor(2.0, requires_grad=True)
    info_nce_per_sample(predicted, pool, torch.tensor([4, 0]), scale).sum().backward()
    assert predicted.grad.abs().min() > 0 and scale.grad != 0
    assert pool.grad is None


def test_scale_is_capped_at_one_hundred():
    predicted, pool, label = torch.randn(1, 1, 4), torch.randn(3, 1, 4), torch.tensor([2])
    at_cap = info_nce_per_sample(predicted, pool, label, torch.tensor(math.log(100.0)))
    torch.testing.assert_close(info_nce_per_sample(predicted, pool, label, torch.tensor(9.0)), at_cap)


def test_info_nce_stays_float32_under_autocast():
    predicted, pool, label = torch.randn(1, 1, 64), torch.randn(3, 1, 64), torch.tensor([2])
    plain = info_nce_per_sample(predicted, pool, label, torch.tensor(2.0))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(info_nce_per_sample(predicted, pool, label, torch.tensor(2.0)), plain)


def test_info_nce_refuses_a_pool_of_another_teacher():
    with pytest.raises(ValueError, match="expected the pool in their tokens and width"):
        info_nce_per_sample(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4), torch.tensor([0]), torch.tensor(2.0))
