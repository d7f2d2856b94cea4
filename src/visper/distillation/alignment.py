"""Maps a target onto the student's image tokens, so that each token predicts the teacher's features at its place.

Shape suffixes: M = targets, S = images, K = tokens of one image, N = teacher tokens, E = teacher width.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d, grid_sample

from visper.data.images import cell_centers
from visper.distillation.layout import Positions, TokenLayout
from visper.distillation.teachers.base import TargetSpec


@dataclass(frozen=True)
class TokenPlaces:
    """The place of each image token on its image.

    Attributes:
        points: ``[S, K, 2]`` (x, y) in 0..1.
        mask: ``[S, K]``, False at tokens that show nothing of the image; None: every token shows something.
        side: side of the grid, if all images have the same square grid; None: they do not.
    """

    points: Tensor
    mask: Tensor | None
    side: int | None = None

    @classmethod
    def of(cls, layout: TokenLayout, positions: Positions) -> TokenPlaces:
        """The places of the image tokens at ``positions`` (``layout.image_positions()``).

        Raises:
            ValueError: the layout has no places, and an image's tokens are not a square grid.
        """
        images, longest = positions.index.shape
        counts = [longest] * images if positions.mask is None else positions.mask.sum(1).tolist()
        if layout.places is None:
            points = [_square(int(count), positions.index.device) for count in counts]
            side = isqrt(longest) if positions.mask is None else None
        else:
            points = list(layout.places.split([int(count) for count in counts]))
            side = None
            if bool(((layout.places - 0.5).abs() > 1).any()):  # rounding may lead a little beyond the image
                raise ValueError("places have points beyond 0..1: divide pixels by the image's width and height")
        padded = torch.nn.utils.rnn.pad_sequence(points, batch_first=True, padding_value=float("nan"))
        seen = ~padded.isnan().any(-1)
        return cls(padded.nan_to_num(0.5), None if side is not None else seen, side)


def _square(tokens: int, device: torch.device) -> Tensor:
    side = isqrt(tokens)
    if side * side != tokens:
        raise ValueError(
            f"an image of {tokens} tokens is not a square grid: give 'places', the point of the image that each token "
            "shows"
        )
    return cell_centers(side, side, device)


def laid_on_tokens(target_MNE: Tensor, spec: TargetSpec, places: TokenPlaces, image: int | None = None) -> Tensor:
    """The targets' values at the places of tokens, ``[M, K, E]``, bilinear between the centers of the target's cells.

    Args:
        target_MNE: one target per image, or, with ``image``, any number.
        spec: their shape.
        places: places of the tokens.
        image: use this image's places for every target; default: target m belongs to image m.
    """
    assert spec.grid is not None
    if places.side is not None and spec.grid == (places.side, places.side):
        return target_MNE
    points = places.points if image is None else places.points[image].expand(len(target_MNE), -1, -1)
    maps_MEHW = target_MNE.float().transpose(1, 2).unflatten(2, spec.grid)
    # Points beyond the outermost centers, within half a cell of the border, get the value at the border.
    at = (points * 2 - 1)[:, :, None]
    return grid_sample(maps_MEHW, at, padding_mode="border", align_corners=False)[..., 0].transpose(1, 2)


def laid_on_grid(predicted_SKE: Tensor, spec: TargetSpec, places: TokenPlaces) -> Tensor:
    """The inverse, for drawing: the tokens' predictions on the target's grid, ``[S, N, E]``.

    Predictions on a square grid are interpolated; otherwise each cell of the target gets that of the nearest token.
    """
    assert spec.grid is not None
    points = cell_centers(*spec.grid, predicted_SKE.device).expand(len(predicted_SKE), -1, -1)
    if places.side is None:
        distances_SNK = torch.cdist(points, places.points)
        if places.mask is not None:
            distances_SNK = distances_SNK.masked_fill(~places.mask[:, None], torch.inf)
        nearest_SN1 = distances_SNK.argmin(-1, keepdim=True)
        return predicted_SKE.gather(1, nearest_SN1.expand(-1, -1, predicted_SKE.shape[-1]))
    own = TargetSpec(places.side**2, predicted_SKE.shape[-1], (places.side, places.side))
    return laid_on_tokens(predicted_SKE, own, TokenPlaces(points, None))


def pooled(values_MNE: Tensor, tokens: int) -> Tensor:
    """``[M, tokens, E]``: means over consecutive groups of tokens, so that sets of different sizes can be compared."""
    if values_MNE.shape[1] == tokens:
        return values_MNE
    return adaptive_avg_pool1d(values_MNE.float().transpose(1, 2), tokens).transpose(1, 2)
