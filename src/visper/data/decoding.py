"""Image files decoded: upright RGB, whatever their mode, orientation tag or name say. Needs no torch."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from visper.common.errors import DataError
from visper.config.schema import MAX_PIXELS

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Pillow's names of what is opened, whatever the file is called; a camera's MPO is a JPEG to it. No vector format is
among them: Pillow starts Ghostscript for EPS."""
WHITE = (255, 255, 255)
_REFUSED = {
    b"%!PS": "EPS",
    b"\xc5\xd0\xd3\xc6": "EPS",
    b"%PDF": "PDF",
    b"\xd7\xcd\xc6\x9a": "WMF",
    b"\x01\0\0\0": "EMF",
    b"<svg": "SVG",
    b"8BPS": "PSD",
}
_RANGES = (1.0, 255.0, 1023.0, 4095.0, 16383.0, 65535.0)
# EXIF's orientation tag -> what makes the image upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(
    path: str | Path,
    content: bytes | None = None,
    ground: tuple[int, int, int] | None = WHITE,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """Opens and decodes an image: upright RGB, whatever its mode, orientation tag or file name say.

    The content decides about the format (GIF under .jpg occurs; its first frame is taken).

    Gray values of 16 or 32 bits and floats keep their scale where they use it: that of the smallest of 8, 10, 12, 14
    and 16 bits that holds them all (floats: 0 to 1 before these). Where the brightest is below a quarter of it, or
    values are negative or larger than 16 bits, the darkest becomes black and the brightest white.

    Args:
        path: the file, or the name of an image whose ``content`` is at hand.
        content: of an image that a source holds.
        ground: what transparent images are laid upon, RGB, 0 to 255; None: their transparency is dropped.
        max_pixels: of the largest image that is decoded.

    Raises:
        DataError: the file is missing, empty, truncated, too large, of a format not allowed or no image; ``reason``
            tells which.
    """
    with opened(path, content, max_pixels) as image:
        image.seek(0)
        image.load()
        turn = turn_of(image)
        return _to_rgb(image if turn is None else image.transpose(turn), ground)


@contextmanager
def opened(path: str | Path, content: bytes | None = None, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """The image, not yet decoded; what goes wrong with it inside becomes a ``DataError``; see ``open_image``."""
    path = Path(path)
    try:
        there = content is not None or path.is_file()
    except OSError:  # a name that is too long, a folder that may not be entered
        there = False
    if not there:
        raise DataError("missing image", _where_it_ends(path))
    if not (path.stat().st_size if content is None else content):
        raise DataError("empty image file", f"'{path}' has no bytes: fetch it again")
    try:
        with Image.open(path if content is None else io.BytesIO(content), formats=_formats()) as image:
            if image.width * image.height > max_pixels:
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
            yield image
    except UnidentifiedImageError as error:
        refused = _refused_format(path, content)
        if refused is not None:
            raise DataError("format not allowed", f"'{path}' is {refused}: expected {', '.join(FORMATS)}") from error
        raise DataError("not an image", f"'{path}': its content is none of {', '.join(FORMATS)}") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DataError(
            "huge image",
            f"'{path}': {error}; at most {max_pixels:,} are decoded: save it smaller, or raise data.max_pixels",
        ) from error
    except MemoryError:
        raise
    except Exception as error:
        if "MAX_TEXT_" in str(error):  # Pillow's limits on a PNG's text, which have no error type of their own
            raise DataError("huge metadata", f"'{path}': {error}; save it without its text chunks") from error
        # Given odd bytes, Pillow's many decoders raise anything: RuntimeError, TypeError ...
        raise DataError("broken image", f"'{path}': {error or type(error).__name__}; fetch it again") from error


def _where_it_ends(path: Path) -> str:
    """What of a path is there, for whoever gave the wrong folder or has not unpacked an archive."""
    full = path.absolute()
    there = next(folder for folder in full.parents if os.path.isdir(folder))  # noqa: PTH112 - never raises
    start = f" ('{path}' starts from the folder in which the command runs)" if full != path else ""
    return (
        f"'{full}' is not a file{start}; of its folders '{there}' exists. Rows name images relative to the 'images' "
        "folder of their source: is that the right one, and are all archives unpacked under it?"
    )


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """What makes the image upright, by its EXIF tag; None: it is, or its metadata are broken."""
    try:
        return _TURNS.get(int(image.getexif().get(ExifTags.Base.Orientation, 1)))
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, struct.error):
        return None


@cache
def _formats() -> tuple[str, ...]:
    """Those of ``FORMATS`` that this build of Pillow has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _refused_format(path: Path, content: bytes | None) -> str | None:
    if content is None:
        with path.open("rb") as file:
            content = file.read(16)
    start = content.lstrip()
    return next((name for magic, name in _REFUSED.items() if start.startswith(magic)), None)


def _to_rgb(image: Image.Image, ground: tuple[int, int, int] | None) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return _eight_bits(image).convert("RGB")
    if image.mode == "RGB" and "transparency" not in image.info:
        return image  # `convert` would copy it
    see_through = image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info
    if not see_through or ground is None:
        return (image.convert("RGBA") if see_through and image.mode == "P" else image).convert("RGB")
    layer = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (*ground, 255)), layer).convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Gray of 16 or 32 bits or floats in 8 bits; see ``open_image`` for the rule."""
    values = np.asarray(image if image.mode == "F" else image.convert("I"), dtype=np.float64)
    finite = np.isfinite(values)
    if not finite.any():
        raise ValueError("not one of its values is a finite number")
    low, high = float(values[finite].min()), float(values[finite].max())
    top = next((top for top in _RANGES[image.mode != "F" :] if high <= top), None)
    if low >= 0 and top is not None and high >= top / 4:
        low, high = 0.0, top
    elif low == high:
        low = min(low, 0.0)
    values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    scaled = (values - low) / ((high - low) / 255 or 1.0)
    return Image.fromarray((scaled + 1e-9).clip(0, 255).astype(np.uint8))
