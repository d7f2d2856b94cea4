"""Targets on the student's tokens."""

import pytest
import torch

from visper.distillation import TargetSpec, TokenLayout
from visper.distillation.alignment import TokenPlaces, laid_on_grid, laid_on_tokens, pooled

IMAGE = 9


def places_of(tokens, **more):
    """Of one image after another, each in a row of its own."""
    longest = max(tokens)
    ids = torch.tensor([[IMAGE] * n + [1] * (longest - n) for n in tokens])
    layout = TokenLayout.from_ids(ids, None, IMAGE, {}, **more)
    return TokenPlaces.of(layout, layout.image_positions())


def ramp(side):
    """A map ``[1, side * side, 2]`` whose values are each cell's center (x, y)."""
    centers = (torch.arange(side) + 0.5) / side
    y, x = torch.meshgrid(centers, centers, indexing="ij")
    return torch.stack((x, y), -1).flatten(0, 1)[None]


def test_on_the_same_grid_nothing_changes():
    target = torch.randn(2, 16, 3)
    assert laid_on_tokens(target, TargetSpec(16, 3, (4, 4)), places_of([16, 16])) is target


@pytest.mark.parametrize(("theirs", "ours"), [(8, 4), (6, 4), (4, 6)])
def test_each_token_gets_the_map_at_its_place(theirs, ours):
    laid = laid_on_tokens(ramp(theirs), TargetSpec(theirs**2, 2, (theirs, theirs)), places_of([ours**2]))
    # Beyond the outermost centers of a coarser map there is nothing between which to look.
    inside = ramp(ours).clamp(0.5 / theirs, 1 - 0.5 / theirs)
    torch.testing.assert_close(laid, inside, rtol=0, atol=1e-6)


def test_images_of_several_shapes_are_padded():
    places = places_of([16, 4])
    laid = laid_on_tokens(ramp(8).expand(2, -1, -1), TargetSpec(64, 2, (8, 8)), places)
    assert places.mask.sum(1).tolist() == [16, 4] and places.side is None
    torch.testing.assert_close(laid[1, :4], ramp(2)[0], rtol=0, atol=1e-6)


def test_tokens_that_show_nothing_are_masked():
    points = torch.tensor([[0.25, 0.5], [float("nan"), float("nan")], [0.75, 0.5]])
    places = places_of([3], places=points)
    laid = laid_on_tokens(ramp(8), TargetSpec(64, 2, (8, 8)), places)
    assert places.mask.tolist() == [[True, False, True]]
    torch.testing.assert_close(laid[0, [0, 2]], points[[0, 2]], rtol=0, atol=1e-6)


def test_tokens_that_are_no_square_need_places():
    with pytest.raises(ValueError, match="an image of 6 tokens is not a square grid"):
        places_of([6])


def test_predictions_go_back_to_the_targets_grid():
    back = laid_on_grid(ramp(4), TargetSpec(64, 2, (8, 8)), places_of([16]))
    torch.testing.assert_close(back, ramp(8).clamp(0.125, 0.875), rtol=0, atol=1e-6)


def test_predictions_of_any_grid_are_drawn_where_their_tokens_lie():
    """A grid of 3 x 5 tokens with a separator at each line's end, each predicting its own place."""
    y, x = torch.meshgrid((torch.arange(3) + 0.5) / 3, (torch.arange(5) + 0.5) / 5, indexing="ij")
    lines = torch.nn.functional.pad(torch.stack((x, y), -1), (0, 0, 0, 1), value=float("nan"))
    points = lines.flatten(0, 1)
    back = laid_on_grid(points.nan_to_num(9.0)[None], TargetSpec(64, 2, (8, 8)), places_of([18], places=points))
    assert ((back - ramp(8)).abs() <= torch.tensor((0.1, 1 / 6)) + 1e-6).all()  # half a token's sides


def test_sets_of_tokens_are_compared_by_the_means_of_their_groups():
    assert pooled(torch.arange(4.0).view(1, 4, 1), 2).flatten().tolist() == [0.5, 2.5]
