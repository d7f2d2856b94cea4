"""Our image geometry equals the published preprocessing (golden fixture g6).

Two deviations. Transparent images are laid upon white, which ``ground=None`` turns off here: the published code drops
transparency. And the published code reads an image 1 or 3 pixels high as channels-first and mixes up its axes; ours
does not, so `crop` of such an image differs (`pad` makes it square first, and agrees).
"""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from tests.conftest import Golden
from visper.data.images import arrange, build_image_processor, open_image, student_pixels

GEOMETRY = {"pad": "pad", "crop": "crop"}


def cases(golden: Golden, pattern: str) -> list[tuple[str, re.Match[str], torch.Tensor]]:
    _, tensors = golden("g6_images")
    found = [(name.split("/")[0], re.fullmatch(pattern, name.split("/")[1]), value) for name, value in tensors.items()]
    found = [(image, match, value) for image, match, value in found if match]
    assert found, f"the fixture has no {pattern}"
    return found


def opened(golden: Golden, name: str) -> Image.Image:
    return open_image(golden.path(f"g6_images/{name}.png"), ground=None)


def test_pictures_of_every_mode_are_read_alike(golden: Golden) -> None:
    for name, _, theirs in cases(golden, "rgb"):
        assert np.array_equal(np.asarray(opened(golden, name)), theirs.numpy()), name


def test_padding_puts_the_picture_in_the_same_place(golden: Golden) -> None:
    config, _ = golden("g6_images")
    for name, _, theirs in cases(golden, "padded"):
        if theirs.ndim == 3:
            ours = arrange(opened(golden, name), "pad", config["pad_colour"])
            assert np.array_equal(np.asarray(ours), theirs.numpy()), name


@pytest.mark.parametrize("backend", ["ours", "pil"])
def test_pixels_equal_the_published(golden: Golden, backend: str) -> None:
    """Exactly with Pillow's resize; with torch's, which a reloaded processor uses, up to one gray level.

    Training and inference must see the same pixels, and transformers reloads the processor on torch, so ours is torch.
    """
    config, _ = golden("g6_images")
    gray_level = 1 / 255 / min(config["image_std"])
    for name, match, theirs in cases(golden, r"(pad|crop)(\d+)(?:_every(\d+))?"):
        kind, size, step = match.group(1), int(match.group(2)), int(match.group(3) or 1)
        image = opened(golden, name)
        processor = build_image_processor(GEOMETRY[kind], size, config["image_mean"], config["image_std"])
        if backend == "pil":
            processor = LlavaImageProcessorPil(**processor.to_dict())
        ours = student_pixels(processor, image)[:, ::step, ::step]
        difference = (ours - theirs).abs()
        if kind == "crop" and image.height in (1, 3):
            assert difference.max() > gray_level, "FAULT: the published axes are mixed up"
            continue
        # Measured with Pillow's resize: 0. With torch's: 0.01501 = one gray level / 0.261, mean at most 1.1e-4.
        assert difference.max() <= (gray_level + 1e-6 if backend == "ours" else 1e-6), (name, match.group())
        assert difference.mean() <= 3e-4, (name, match.group())
