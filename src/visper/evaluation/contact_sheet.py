"""Contact sheets: captioned images in rows."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from visper.common.errors import ConfigError

GAP, CAPTION = 6, 24
"""Pixels between tiles, and height of a caption above its tile."""

COARSE = 128
"""An image of at most this many pixels per side is a grid of cells, which keep hard edges when it is enlarged."""

Tile = tuple[str, Image.Image]
"""A caption (may be empty) and an image."""


def contact_sheet(rows: Sequence[Sequence[Tile]], side: int = 128) -> Image.Image:
    """Rows of captioned images as one image. Rows may differ in length; rows without captions are set closer.

    Args:
        side: side of each tile in pixels; images are squashed to it.
    """
    tops = [CAPTION if any(caption for caption, _ in row) else 0 for row in rows]
    width = max(len(row) for row in rows) * (side + GAP) + GAP
    canvas = Image.new("RGB", (width, sum(tops) + len(rows) * (side + GAP)), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=12)
    y = 0
    for row, top in zip(rows, tops, strict=True):
        for column, (caption, image) in enumerate(row):
            x = GAP + column * (side + GAP)
            draw.text((x + side / 2, y + top / 2), caption, fill="#1c2330", font=font, anchor="mm")
            how = Image.Resampling.NEAREST if max(image.size) <= COARSE else Image.Resampling.LANCZOS
            canvas.paste(image.convert("RGB").resize((side, side), how), (x, y + top))
        y += top + side + GAP
    return canvas


def with_note(sheet: Image.Image, note: str) -> Image.Image:
    """The sheet with lines of text above it."""
    font = ImageFont.load_default(size=16)
    lines = textwrap.wrap(note, max(20, (sheet.width - 2 * GAP) // 9))
    canvas = Image.new("RGB", (sheet.width, sheet.height + CAPTION * len(lines)), "white")
    canvas.paste(sheet, (0, CAPTION * len(lines)))
    draw = ImageDraw.Draw(canvas)
    for number, line in enumerate(lines):
        draw.text((GAP, CAPTION * (number + 0.5)), line, fill="#a02020", font=font, anchor="lm")
    return canvas


def images_of(drawn: Tensor) -> list[Image.Image]:
    """Converts a teacher's drawings ``[B, 3, H, W]`` in 0..1 to images.

    Raises:
        ConfigError: they have another shape; a ``decode`` of the user's own makes them.
    """
    if drawn.ndim != 4 or drawn.shape[1] != 3:
        raise ConfigError(f"the teacher's 'decode' drew {tuple(drawn.shape)}, expected images [B, 3, H, W] in 0..1")
    values = (drawn.clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(value) for value in values]
