"""Draws segmentations as images, with a color and a name for each class.

Shapes: B = images, H, W = pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

NAMED_FROM = 0.01
"""Smallest share of the image at which a segment's name is written on it."""


def class_colors(classes: int) -> Tensor:
    """``[classes, 3]`` colors in 0..1: the bits of the class number spread over the channels, as VOC does."""
    colors = torch.zeros(classes, 3, dtype=torch.long)
    for bit in range(24):
        colors[:, bit % 3] |= ((torch.arange(classes) >> bit) & 1) << (7 - bit // 3)
    return colors / 255.0


@dataclass(frozen=True)
class Segmentation:
    """One image's segments."""

    segments: Tensor  # [H, W] long, the number of the segment at each pixel; 0 for no segment
    classes: dict[int, int]  # number of a segment -> its class
    names: dict[int, str]  # class -> its name


def segment_images(found: Sequence[Segmentation], borders: bool) -> Tensor:
    """``[B, 3, H, W]`` in 0..1: a color for each class, and its name on its larger segments.

    Args:
        found: segmentations of the same size.
        borders: draw a dark line where two segments meet (segments of one class have the same color).
    """
    return torch.stack([_draw(one, borders) for one in found])


def _draw(found: Segmentation, borders: bool) -> Tensor:
    segments = found.segments.cpu()
    # Class 0 is an ordinary class: black is reserved for pixels without a segment.
    color_of = torch.zeros(int(segments.max()) + 1, dtype=torch.long)
    for number, index in found.classes.items():
        color_of[number] = index + 1
    palette = class_colors(int(color_of.max()) + 1)
    colors = palette[color_of[segments]]
    if borders:
        edge = torch.zeros_like(segments, dtype=torch.bool)
        edge[1:] |= segments[1:] != segments[:-1]
        edge[:, 1:] |= segments[:, 1:] != segments[:, :-1]
        colors[edge] = 0.1
    image = Image.fromarray((colors * 255).byte().numpy())
    _write_names(image, segments, found)
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255.0


def _write_names(image: Image.Image, segments: Tensor, found: Segmentation) -> None:
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=max(8, image.height // 26))
    for number, index in found.classes.items():
        places = (segments == number).nonzero()
        if len(places) < NAMED_FROM * segments.numel():
            continue
        row, column = places.median(0).values.tolist()
        draw.text((column, row), found.names[index], "white", font, "mm", stroke_width=1, stroke_fill="black")
