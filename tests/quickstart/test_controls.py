"""Findings beside their controls."""

import pytest
import torch

from visper.evaluation.probe.measures import centered_cosine


def test_the_common_layout_earns_no_cosine():
    mean = torch.randn(5, 4) * 10
    own, other = torch.randn(30, 5, 4), torch.randn(30, 5, 4)
    plain = torch.nn.functional.cosine_similarity((other + mean).flatten(1), (own + mean).flatten(1)).mean()
    assert plain > 0.9, "this is what an uncentered cosine would report for an unrelated prediction"
    assert abs(centered_cosine(other + mean, own + mean, mean).mean()) < 0.2
    assert centered_cosine(own + mean, own + mean, mean).tolist() == pytest.approx([1.0] * 30)
