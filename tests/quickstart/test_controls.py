"""Findings beside their controls."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from visper.evaluation.probe.measures import TEACHER, centered_cosine
from visper.quickstart import probed
from visper.quickstart.controls import HeldOut, _drawn


def test_the_common_layout_earns_no_cosine():
    mean = torch.randn(5, 4) * 10
    own, other = torch.randn(30, 5, 4), torch.randn(30, 5, 4)
    plain = torch.nn.functional.cosine_similarity((other + mean).flatten(1), (own + mean).flatten(1)).mean()
    assert plain > 0.9, "this is what an uncentered cosine would report for an unrelated prediction"
    assert abs(centered_cosine(other + mean, own + mean, mean).mean()) < 0.2
    assert centered_cosine(own + mean, own + mean, mean).tolist() == pytest.approx([1.0] * 30)


def scenes(depth, classes, objects):
    """Scenes of one row of two pixels."""
    maps = (torch.tensor(values)[:, None] for values in (depth, classes, objects))
    return HeldOut([], *maps)


FIT = scenes([[1.0, 4.0], [4.0, 4.0]] * 2, [[0, 0], [0, 3], [2, 3], [0, 3]], [[0, 0], [0, 1], [1, 1], [0, 1]])
JUDGED = scenes([[2.0, 2.0]], [[2, 1]], [[True, False]])


@pytest.mark.parametrize(
    ("head", "predicted", "target", "expected"),
    [
        # The mean map is [2, 4] meters.
        ("depth", [1.0, 2.0], [2.0, 4.0], {"image": (0.25, 0.5, 0.5), "objects": (0.5, 0.0, 0.0)}),
        # The most frequent classes are 0 and 3, those of objects 2 and 3.
        ("classes", [2, 0], [2, 1], {"image": (0.5, 0.0, 1.0), "objects": (1.0, 1.0, 1.0)}),
    ],
)
def test_a_map_is_judged_beside_a_guess_by_position_and_its_teacher(head, predicted, target, expected):
    def decoded(values):
        maps = torch.tensor(values)[None, None]  # [S, H, W]
        return maps[:, None] if head == "depth" else F.one_hot(maps, 4).permute(0, 3, 1, 2)

    config = SimpleNamespace(head=head)
    teacher = SimpleNamespace(model=SimpleNamespace(config=config), decode_values=decoded)
    found = _drawn("any/1", teacher, predicted, target, FIT, JUDGED)
    assert [f.measure.rpartition(" ")[2] for f in found] == list(expected)
    for finding, (value, guess, ceiling) in zip(found, expected.values(), strict=True):
        blind = next(score for name, score in finding.controls.items() if name != TEACHER)
        assert (finding.value, blind, finding.controls[TEACHER]) == pytest.approx((value, guess, ceiling))
        assert finding.higher == (head == "classes")


def test_the_interval_of_a_share_of_pixels_is_over_scenes():
    """Scenes of 1, 2 and 1 object pixels, of which 0, 2 and 1 are right: numpy's ratio estimator."""
    shown = scenes([[1.0] * 2] * 3, [[0, 0], [1, 1], [2, 0]], [[True, False], [True, True], [True, False]])
    drawn = F.one_hot(torch.tensor([[1, 0], [1, 1], [2, 1]])[:, None], 3).permute(0, 3, 1, 2)
    teacher = SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(head="classes")), decode_values=lambda v: v)
    fit = scenes([[1.0] * 2] * 3, [[0, 1], [1, 1], [2, 2]], [[True, True]] * 3)
    found = _drawn("seg/1", teacher, drawn, drawn, fit, shown)[1]
    right, seen = np.array([0, 2, 1]), np.array([1, 2, 1])
    error = np.sqrt(np.var(right - 0.75 * seen, ddof=1) / 3) / seen.mean()
    half = 4.302653 * error
    assert found.value == 0.75 and found.interval == pytest.approx((0.75 - half, 0.75 + half), rel=1e-5)


def test_scores_on_a_world_say_how_many_scenes_it_had_to_judge(monkeypatch):
    targets = torch.randn(3, 5, 4)
    world = HeldOut([None] * 3, *[torch.ones(3, 1, 2)] * 3)
    monkeypatch.setattr(HeldOut, "halves", lambda folder, judged: (world, world))
    monkeypatch.setattr(probed, "drawing_teachers", lambda run: {})
    monkeypatch.setattr(probed, "sources_of", lambda *given: {"depth": lambda images: targets})
    monkeypatch.setattr(probed, "predict_images", lambda *given: {"depth/1": targets})
    (found,) = probed.world_findings(SimpleNamespace(run=None, model=None), "world", 300)
    assert (found.images, found.value, found.interval) == (3, pytest.approx(1.0), pytest.approx((1.0, 1.0), abs=1e-5))
