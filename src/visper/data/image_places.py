"""The place of each image token on its image, for models that split images into patches, tiles and views.

A place is a point (x, y) in 0..1, or NaN for a token that shows no part of the image (the end of a line of patches).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt, sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution
from transformers.models.gemma4.image_processing_gemma4 import get_aspect_ratio_preserving_size
from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas
from transformers.models.pixtral.image_processing_pixtral import get_resize_output_image_size

from visper.common.errors import ConfigError
from visper.data.images import cell_centers, visible_places


@dataclass(frozen=True)
class Shown:
    """An image as seen by the model's processor: ``size`` is width and height in pixels, ``tokens`` its number of image
    tokens, ``alone`` whether it is the only image of its row, ``grid`` its ``image_grid_thw`` ``[3]``, if there is one.
    """

    size: tuple[int, int]
    tokens: int
    alone: bool = True
    grid: Tensor | None = None


def knows_places(processor: Any) -> bool:
    """Whether ``places_of`` supports this processor."""
    return _rule(processor) is not None


def places_of(processor: Any, shown: Shown) -> Tensor | None:
    """The places of an image's tokens, ``[tokens, 2]``; None if the processor is not supported.

    Raises:
        ConfigError: the processor has made another number of tokens than expected.
    """
    rule = _rule(processor)
    if rule is None:
        return None
    places = rule(processor, shown)
    if len(places) != shown.tokens:
        raise ConfigError(
            f"{type(processor).__name__} made {shown.tokens} tokens for an image of {shown.size[0]} x {shown.size[1]} "
            f"pixels, expected {len(places)}: this version of transformers is not supported for targets at image "
            "tokens; set head.kind to resampler"
        )
    return places


def _rule(processor: Any) -> Callable[[Any, Shown], Tensor] | None:
    images = processor.image_processor
    return next((rule for (own, of), rule in _RULES.items() if hasattr(images, own) and hasattr(processor, of)), None)


def _tiles(rows: int, columns: int, tokens: int) -> Tensor:
    """Centers of the cells of tiles that cover the image, row by row; each tile is a square of ``tokens`` cells."""
    corners = [(column, row) for row in range(rows) for column in range(columns)]
    cells = cell_centers(isqrt(tokens), isqrt(tokens))
    return torch.cat([(cells + torch.tensor(corner)) / torch.tensor((columns, rows)) for corner in corners])


def _merged_patches(processor: Any, shown: Shown) -> Tensor:
    """Qwen: one grid, each token a square of merged patches."""
    assert shown.grid is not None
    merge = processor.image_processor.merge_size
    return cell_centers(int(shown.grid[1]) // merge, int(shown.grid[2]) // merge)


def _tiles_and_view(processor: Any, shown: Shown) -> Tensor:
    """InternVL: tiles, then a view of the full image if there are several tiles."""
    images, tokens = processor.image_processor, processor.image_seq_length
    tile = (images.size["height"], images.size["width"])
    size = (shown.size[1], shown.size[0])
    columns, rows = get_optimal_tiled_canvas(size, tile, images.min_patches, images.max_patches)
    tiles = _tiles(rows, columns, tokens)
    return tiles if rows * columns == 1 else torch.cat((tiles, _tiles(1, 1, tokens)))


def _split_and_view(processor: Any, shown: Shown) -> Tensor:
    """SmolVLM: tiles if the image is split, then a view of the full image."""
    _, rows, columns = processor.image_processor.get_number_of_image_patches(shown.size[1], shown.size[0], {})
    view = _tiles(1, 1, processor.image_seq_len)
    split = shown.tokens > processor.image_seq_len
    return torch.cat((_tiles(rows, columns, processor.image_seq_len), view)) if split else view


def _view_and_lines(processor: Any, shown: Shown) -> Tensor:
    """LLaVA-OneVision: a view of the full image, then the image in finer lines, each followed by an end token.

    The lines cover the image to within half a token, since the model drops padding in whole tokens. If a row has
    several images, each is padded to a square instead.
    """
    side = isqrt(processor.num_image_tokens)
    end = torch.full((1, 2), float("nan"))
    if not shown.alone:
        seen = visible_places(shown.size, side * side)
        assert seen is not None
        # From coordinates of the square to those of the image, which is what a teacher sees.
        in_image = (seen - 0.5) * max(shown.size) / torch.tensor(shown.size) + 0.5
        return torch.cat((in_image, end))
    width, height = shown.size
    images = processor.image_processor
    pixels = images.size["height"]
    best = select_best_resolution((height, width), images.image_grid_pinpoints)
    rows, columns = (length // pixels * side for length in best)
    if width / height > columns / rows:
        rows -= (rows - int(round(height * (columns / width), 7))) // 2 * 2
    else:
        columns -= (columns - int(round(width * (rows / height), 7))) // 2 * 2
    ratio = sqrt(rows * columns / (int(processor.vision_aspect_ratio.removeprefix("anyres_max_")) * side * side))
    if ratio > 1.1:
        rows, columns = int(rows // ratio), int(columns // ratio)
    lines = torch.cat((cell_centers(rows, columns).unflatten(0, (rows, columns)), end.expand(rows, 1, 2)), 1)
    return torch.cat((cell_centers(side, side), lines.flatten(0, 1)))


def _views(processor: Any, shown: Shown) -> Tensor:
    """Gemma 3: a view of the full image; the tokens of crops, if any, have no place."""
    view = _tiles(1, 1, processor.image_seq_length)
    return torch.cat((view, torch.full((shown.tokens - len(view), 2), float("nan"))))


def _pooled_patches(processor: Any, shown: Shown) -> Tensor:
    """Gemma 4: one grid, each token a square of pooled patches."""
    images = processor.image_processor
    side = images.patch_size * images.pooling_kernel_size
    height, width = get_aspect_ratio_preserving_size(
        shown.size[1],
        shown.size[0],
        images.patch_size,
        images.max_soft_tokens * images.pooling_kernel_size**2,
        images.pooling_kernel_size,
    )
    return cell_centers(height // side, width // side)


def _lines_of_patches(processor: Any, shown: Shown) -> Tensor:
    """Mistral 3: one grid, each token a square of patches; its lines end in tokens of another kind."""
    side = processor.patch_size * processor.spatial_merge_size
    longest = processor.image_processor.size["longest_edge"]
    blank = np.empty((3, shown.size[1], shown.size[0]), np.uint8)
    height, width = get_resize_output_image_size(blank, longest, side)
    return cell_centers(height // side, width // side)


_RULES: dict[tuple[str, str], Callable[[Any, Shown], Tensor]] = {
    ("merge_size", "video_processor"): _merged_patches,
    ("max_patches", "end_image_token_id"): _tiles_and_view,
    ("image_grid_pinpoints", "vision_aspect_ratio"): _view_and_lines,
    ("max_image_size", "image_seq_len"): _split_and_view,
    ("do_pan_and_scan", "image_seq_length"): _views,
    ("max_soft_tokens", "image_seq_length"): _pooled_patches,
    ("patch_size", "image_break_token"): _lines_of_patches,
}
"""An attribute of the image processor and one of the processor that together identify a family -> the places of its
tokens. The first alone does not: LLaVA-NeXT, Aya Vision, Aria and Ovis2 cut images in the same way but order their
tokens differently."""
