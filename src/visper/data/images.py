"""The image geometry that student and teachers share.

``squash`` scales both sides to the square, ``pad`` puts the image on a square of the encoder's mean color, ``crop``
keeps the central square. The student sees the output of the saved image processor, in training and at inference;
teachers see the output of ``arrange``, which covers the same pixels. For both, images with an extreme aspect ratio,
whose square would take gigabytes, are first reduced by ``bounded``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize
from transformers import LlavaImageProcessor

from visper.config.data import MAX_PIXELS
from visper.data.decoding import open_image as open_image  # re-exported: callers need both

GEOMETRIES = ("squash", "pad", "crop")
MAX_RATIO = 16
"""Aspect ratio up to which images are arranged pixel for pixel as in the published code, unless their square has more
than ``MAX_PIXELS``."""
LONG_SIDE = 2048
"""Longer side, in pixels, to which images with a larger aspect ratio are scaled before padding; encoders and teachers
do not see finer detail."""


def bounded(image: Image.Image, geometry: str) -> Image.Image:
    """The image, or one that looks the same in this geometry and whose square takes little memory.

    Without it, ``pad`` would turn 30,000 x 10 pixels into a square of 2.7 GB, and ``crop`` would enlarge 5,000 x 4 a
    hundredfold. Beyond ``MAX_RATIO``, ``crop`` first keeps ``MAX_RATIO`` times the shorter side; beyond it, or if the
    square would have more than ``MAX_PIXELS``, ``pad`` first scales the image to ``LONG_SIDE``. No array then has more
    than ``MAX_RATIO`` times the pixels of the image, of ``LONG_SIDE`` squared or of the target squared.
    """
    width, height = image.size
    short, long = min(width, height), max(width, height)
    extreme = long > MAX_RATIO * short
    if geometry == "crop" and extreme:
        kept = MAX_RATIO * short
        start = (long - kept) // 2
        return image.crop((start, 0, start + kept, short) if width > height else (0, start, short, start + kept))
    if geometry == "pad" and long > LONG_SIDE and (extreme or long * long > MAX_PIXELS):
        size = [max(1, round(side * LONG_SIDE / long)) for side in (width, height)]
        return image.resize((size[0], size[1]), Image.Resampling.BICUBIC)
    return image


def arrange(image: Image.Image, geometry: str, background: Sequence[int] = (0, 0, 0)) -> Image.Image:
    """The part of the image that the student sees, to be resized to a square.

    Args:
        image: RGB.
        geometry: ``squash`` returns the image unchanged (resizing it to a square squashes it), ``pad`` a square with
            ``background`` around it, ``crop`` its central square.
        background: RGB, 0 to 255, see ``background_of``.
    """
    _known(geometry)
    image = bounded(image, geometry)
    width, height = image.size
    if geometry == "squash" or width == height:
        return image
    if geometry == "crop":
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        return image.crop((left, top, left + side, top + side))
    side = max(width, height)
    square = Image.new("RGB", (side, side), tuple(background))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def background_of(image_processor: Any) -> tuple[int, int, int]:
    """The encoder's mean color, with which the image processor pads: RGB, 0 to 255, rounded down."""
    red, green, blue = (int(channel * 255) for channel in image_processor.image_mean)
    return red, green, blue


def build_image_processor(
    geometry: str, image_size: int, mean: Sequence[float], std: Sequence[float]
) -> LlavaImageProcessor:
    """A stock image processor that turns any image into ``[3, image_size, image_size]`` in a geometry.

    It is saved with the model, so inference sees the same images as training. With torch's bicubic resize it differs
    from the published PIL code by at most one gray level, in less than one pixel in a hundred. ``mean`` and
    ``std`` are the encoder's, per channel, for values in 0..1.
    """
    _known(geometry)
    square, crop = {"height": image_size, "width": image_size}, geometry == "crop"
    return LlavaImageProcessor(
        image_mean=list(mean),
        image_std=list(std),
        size={"shortest_edge": image_size} if crop else square,
        crop_size=square,
        do_center_crop=crop,
        do_pad=geometry == "pad",
        resample=Image.Resampling.BICUBIC,
    )


def with_geometry(image_processor: Any, geometry: str) -> LlavaImageProcessor:
    """An image processor with the size and normalization of ``image_processor`` and another geometry."""
    size = output_size(image_processor)
    return build_image_processor(geometry, size, image_processor.image_mean, image_processor.image_std)


def geometry_of(image_processor: Any) -> str:
    """The geometry of an image processor."""
    if getattr(image_processor, "do_pad", False):
        return "pad"
    return "crop" if image_processor.do_center_crop else "squash"


def output_size(image_processor: Any) -> int:
    """The side of an image processor's output, in pixels."""
    size = image_processor.crop_size if image_processor.do_center_crop else image_processor.size
    height = _entry(size, "height") or _entry(size, "shortest_edge")
    width = _entry(size, "width") or height
    if height is None or height != width:
        raise ValueError(f"the image processor makes {size}: expected a square; build it with 'build_image_processor'")
    return int(height)


def student_pixels(image_processor: Any, image: Image.Image) -> torch.Tensor:
    """An image as the student sees it, ``[3, H, W]`` float32, made by the saved image processor."""
    # Passed as a channels-first tensor: otherwise an image 1 or 3 pixels high would be misread, and transformers 5.17
    # permutes the axes twice if told that channels come last.
    pixels: torch.Tensor = image_processor(
        rgb_bytes(bounded(image, geometry_of(image_processor))),
        return_tensors="pt",
        input_data_format="channels_first",
    )["pixel_values"]
    return pixels[0]


def student_bytes(image_processor: Any, image: Image.Image, arranged: torch.Tensor) -> torch.Tensor:
    """``student_pixels`` before normalization, ``[3, H, W]`` uint8, so that loaders send a quarter of the bytes.

    Args:
        image: RGB.
        arranged: the same image after ``arrange``, as a tensor; unless the geometry is ``crop``, it is only resized.
    """
    if geometry_of(image_processor) != "crop":
        side = output_size(image_processor)
        return squashed(arranged, (side, side))
    # The processor resizes before it crops.
    pixels: torch.Tensor = image_processor(
        rgb_bytes(bounded(image, "crop")),
        return_tensors="pt",
        input_data_format="channels_first",
        do_rescale=False,
        do_normalize=False,
    )["pixel_values"]
    return pixels[0]


def normalized_pixels(image_processor: Any, pixels: torch.Tensor) -> torch.Tensor:
    """uint8 pixels ``[..., 3, H, W]`` normalized as by the processor, float32, on their device."""
    made: torch.Tensor = image_processor.rescale_and_normalize(
        pixels,
        image_processor.do_rescale,
        image_processor.rescale_factor,
        image_processor.do_normalize,
        tuple(image_processor.image_mean),  # hashable: the processor caches the tensors by these values
        tuple(image_processor.image_std),
    )
    return made


def rgb_bytes(image: Image.Image) -> torch.Tensor:
    """An image as ``[3, height, width]`` uint8, channels last in memory."""
    rgb = image if image.mode == "RGB" else image.convert("RGB")  # convert always copies
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)


def squashed(image: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """``[3, H, W]`` uint8 resized to ``size`` (height, width): bicubic, with antialiasing.

    It uses torch, as the saved image processor does: four to seven times as fast as Pillow, from which it differs by
    one gray level in at most one value in a hundred, by two in one in a million.
    """
    return resize(image, list(size), InterpolationMode.BICUBIC, antialias=True)


def stacked(images: Sequence[torch.Tensor]) -> torch.Tensor:
    """Images ``[3, h, w]`` stacked to ``[B, 3, h, w]`` in the memory format of the first: a resize is channels last."""
    if images[0].stride(0) != 1:
        return torch.stack(list(images))
    return torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)


def _entry(size: Any, key: str) -> int | None:
    return size.get(key) if isinstance(size, dict) else getattr(size, key, None)


def _known(geometry: str) -> None:
    if geometry not in GEOMETRIES:
        raise ValueError(f"geometry '{geometry}' is unknown: choose one of {', '.join(GEOMETRIES)}")


def cell_centers(rows: int, columns: int, device: torch.device | None = None) -> torch.Tensor:
    """``[rows * columns, 2]``, the centers (x, y) in 0..1 of a grid's cells, row by row."""
    y, x = torch.meshgrid(
        (torch.arange(rows, device=device) + 0.5) / rows,
        (torch.arange(columns, device=device) + 0.5) / columns,
        indexing="ij",
    )
    return torch.stack((x, y), -1).flatten(0, 1)


def visible_places(size: tuple[int, int], tokens: int) -> torch.Tensor | None:
    """The points (x, y) in 0..1 that the tokens of a padded image show, ``[tokens, 2]``; NaN for a token of padding.

    In an image thinner than a token, which covers no token's center, the tokens nearest to it show it. None if the
    tokens are not a square grid.

    Args:
        size: width and height before padding.
    """
    side = math.isqrt(tokens)
    if side**2 != tokens:
        return None
    places = cell_centers(side, side)
    half = torch.tensor(size) / max(size) / 2
    shown = (places - 0.5).abs() <= half.clamp(min=(0.5 + 1e-4) / side)
    return places.clamp(0.5 - half, 0.5 + half).masked_fill(~shown.all(-1, keepdim=True), float("nan"))


def places_seen(geometry: str, sizes: Sequence[tuple[int, int]], tokens: Sequence[int]) -> torch.Tensor | None:
    """``visible_places`` of all images for geometry ``pad``; None for other geometries, or if an image's tokens are not
    a square grid."""
    if geometry != "pad":
        return None
    places = [visible_places(size, count) for size, count in zip(sizes, tokens, strict=True)]
    known = [of_image for of_image in places if of_image is not None]
    return torch.cat(known) if len(known) == len(places) else None
