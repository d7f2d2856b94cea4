"""Images side by side."""

import pytest
import torch
from PIL import Image

from visper.common.errors import ConfigError
from visper.evaluation.contact_sheet import contact_sheet, images_of


def test_the_contact_sheet_is_a_grid():
    image = Image.new("RGB", (8, 8), "red")
    sheet = contact_sheet([[("a", image), ("b", image)]], side=16)
    assert sheet.width > 2 * 16 and sheet.getpixel((sheet.width // 4, sheet.height - 10)) == (255, 0, 0)


def test_rows_may_differ_in_length_and_captions_take_room_only_where_they_are():
    image = Image.new("RGB", (8, 8), "red")
    bare, captioned = ([[(caption, image), (caption, image)], [("", image)]] for caption in ("", "a"))
    assert contact_sheet(bare, 16).width == contact_sheet(captioned, 16).width == 2 * 16 + 3 * 6
    assert contact_sheet(captioned, 16).height - contact_sheet(bare, 16).height == 24


def test_images_become_images():
    (image,) = images_of(torch.tensor([1.0, 0.0, 2.0]).view(1, 3, 1, 1).expand(1, 3, 2, 4))
    assert image.size == (4, 2) and image.getpixel((0, 0)) == (255, 0, 255)


@pytest.mark.parametrize("shape", [(1, 4, 4, 3), (3, 4, 4), (1, 1, 4, 4)])
def test_a_drawing_that_is_no_image_is_refused(shape):
    with pytest.raises(ConfigError, match=r"'decode' drew .*, expected images \[B, 3, H, W\]"):
        images_of(torch.zeros(shape))
