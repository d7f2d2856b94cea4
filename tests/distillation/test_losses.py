import math

import pytest
import torch

from visper.distillation.losses import cosine, gram, info_nce, mse, smooth_l1


def test_smooth_l1_by_hand():
    # Differences 0.5 (squared: 0.125) and 3 (linear: 2.5); 0 and 1 (both formulas: 0.5).
    predicted = torch.tensor([[[0.5, 3.0]], [[0.0, 1.0]]])
    losses = smooth_l1(predicted, torch.zeros(2, 1, 2))
    torch.testing.assert_close(losses, torch.tensor([(0.125 + 2.5) / 2, 0.25]))


def test_smooth_l1_counts_each_sample_alone():
    predicted, target = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    alone = torch.cat([smooth_l1(predicted[i : i + 1], target[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(smooth_l1(predicted, target), alone)


def test_smooth_l1_is_float32_whatever_comes_in():
    assert smooth_l1(torch.ones(1, 1, 2, dtype=torch.bfloat16), torch.zeros(1, 1, 2)).dtype == torch.float32


def test_smooth_l1_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"\(2, 3, 4\).*\(2, 3, 5\)"):
        smooth_l1(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5))


def test_info_nce_by_hand():
    # Cosines with the pool (1, 0), (0, 1), (-1, 0) are 0.6, 0.8, -0.6 whatever the vectors' lengths; factor e^1.
    predicted = torch.tensor([[[3.0, 4.0]]])
    pool = torch.tensor([[[2.0, 0.0]], [[0.0, 0.5]], [[-7.0, 0.0]]])
    loss = info_nce(predicted, pool, torch.tensor([1]), torch.tensor(1.0))
    exponents = [math.exp(math.e * cosine) for cosine in (0.6, 0.8, -0.6)]
    assert loss.item() == pytest.approx(-math.log(exponents[1] / sum(exponents)), abs=1e-6)


def test_info_nce_gives_gradient_to_prediction_and_scale_not_to_the_pool():
    predicted, pool = torch.randn(2, 3, 4, requires_grad=True), torch.randn(5, 3, 4, requires_grad=True)
    scale = torch.tensor(2.0, requires_grad=True)
    info_nce(predicted, pool, torch.tensor([4, 0]), scale).sum().backward()
    assert predicted.grad.abs().min() > 0 and scale.grad != 0
    assert pool.grad is None


def test_scale_is_capped_at_one_hundred():
    predicted, pool, label = torch.randn(1, 1, 4), torch.randn(3, 1, 4), torch.tensor([2])
    at_cap = info_nce(predicted, pool, label, torch.tensor(math.log(100.0)))
    torch.testing.assert_close(info_nce(predicted, pool, label, torch.tensor(9.0)), at_cap)


def test_other_copies_of_an_image_are_no_negatives_of_it():
    predicted, pool, scale = torch.randn(2, 3, 4), torch.randn(3, 3, 4), torch.tensor(1.0)
    same = torch.tensor([[True, False, True], [False, True, False]])  # the first sample's image is in the pool twice
    first, second = info_nce(predicted, pool, torch.tensor([0, 1]), scale, same_BP=same)
    torch.testing.assert_close(first, info_nce(predicted[:1], pool[:2], torch.tensor([0]), scale)[0])
    assert second == info_nce(predicted, pool, torch.tensor([0, 1]), scale)[1]
    distinct = torch.eye(2, 3).bool()
    assert torch.equal(
        info_nce(predicted, pool, torch.tensor([0, 1]), scale, same_BP=distinct),
        info_nce(predicted, pool, torch.tensor([0, 1]), scale),
    )


def test_info_nce_stays_float32_under_autocast():
    predicted, pool, label = torch.randn(1, 1, 64), torch.randn(3, 1, 64), torch.tensor([2])
    plain = info_nce(predicted, pool, label, torch.tensor(2.0))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(info_nce(predicted, pool, label, torch.tensor(2.0)), plain)


def test_info_nce_refuses_a_pool_of_another_teacher():
    with pytest.raises(ValueError, match="expected a pool of the same tokens and width"):
        info_nce(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4), torch.tensor([0]), torch.tensor(2.0))


def test_mse_by_hand():
    assert mse(torch.tensor([[[1.0, 3.0]]]), torch.zeros(1, 1, 2)).tolist() == [5.0]


def test_cosine_by_hand():
    # Cosines 0.6 and 0 whatever the lengths: (0.4 + 1) / 2.
    predicted = torch.tensor([[[3.0, 4.0], [0.0, 2.0]]])
    target = torch.tensor([[[7.0, 0.0], [1.0, 0.0]]])
    torch.testing.assert_close(cosine(predicted, target), torch.tensor([0.7]))


def test_gram_by_hand():
    # Two tokens: predicted ones at a cosine of 0.6, the target's at 0; 2 of 4 pairs are off by 0.6.
    predicted = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]])
    target = torch.tensor([[[0.0, 2.0], [5.0, 0.0]]])
    torch.testing.assert_close(gram(predicted, target), torch.tensor([0.36 * 2 / 4]))


def test_gram_asks_for_likeness_not_for_values():
    target = torch.randn(1, 6, 5)
    rotation = torch.linalg.qr(torch.randn(5, 5)).Q
    assert gram(target @ rotation, target).item() == pytest.approx(0.0, abs=1e-10)
    assert cosine(target @ rotation, target).item() > 0.1


@pytest.mark.parametrize("loss", [smooth_l1, mse, cosine, gram])
def test_masked_tokens_change_nothing_and_get_no_gradient(loss):
    predicted, target = torch.randn(2, 5, 3, requires_grad=True), torch.randn(2, 5, 3)
    mask = torch.tensor([[True] * 5, [True, True, False, True, False]])
    values = loss(predicted, target, mask)
    kept = mask[1]
    alone = torch.cat([loss(predicted[:1], target[:1]), loss(predicted[1:, kept], target[1:, kept])])
    torch.testing.assert_close(values, alone)
    values.sum().backward()
    assert predicted.grad[1, ~kept].abs().max() == 0 < predicted.grad[1, kept].abs().min()


@pytest.mark.parametrize("loss", [smooth_l1, mse, cosine, gram])
def test_targets_get_no_gradient(loss):
    target = torch.randn(1, 2, 3, requires_grad=True)
    loss(torch.randn(1, 2, 3, requires_grad=True), target).sum().backward()
    assert target.grad is None


def test_info_nce_of_masked_tokens_is_that_of_the_others():
    predicted, pool, labels = torch.randn(2, 4, 3), torch.randn(3, 4, 3), torch.tensor([2, 0])
    mask = torch.tensor([[True, False, True, True]] * 2)
    seen = info_nce(predicted[:, mask[0]], pool[:, mask[0]], labels, torch.tensor(1.0))
    torch.testing.assert_close(info_nce(predicted, pool, labels, torch.tensor(1.0), mask), seen)


def test_gram_stays_float32_under_autocast():
    predicted, target = torch.randn(2, 5, 64), torch.randn(2, 5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found = gram(predicted, target)
    assert torch.equal(found, gram(predicted, target))
