"""Decodes image files to upright RGB, whatever their mode, orientation tag or file name. Does not import torch."""

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
from visper.config.data import MAX_PIXELS

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Pillow's names of the formats that are opened, by content; Pillow opens a camera's MPO as JPEG. Vector formats are
excluded: for EPS, Pillow starts Ghostscript."""
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
# EXIF orientation tag -> the operation that makes the image upright.
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
    """Opens and decodes an image as upright RGB, whatever its mode, orientation tag or file name.

    The format is recognized by content (a GIF may be named .jpg); of an animation the first frame is used.

    Gray images of 16 or 32 bits or floats are scaled to 8 bits. Zero is black, and white is the maximum of the smallest
    depth of 8, 10, 12, 14 and 16 bits that holds all values (for floats, 1.0 is tried first). If the brightest value is
    below a quarter of white, or values are negative or exceed 16 bits, the darkest value becomes black and the
    brightest white.

    Args:
        path: the file, or the name of the image if ``content`` is given.
        content: the bytes of an image file embedded in a source.
        ground: background for transparent images, RGB, 0 to 255; None: transparency is dropped.
        max_pixels: largest image that is decoded.

    Raises:
        DataError: the file is missing, empty, truncated, too large, of a format that is not allowed, or not an image;
            ``reason`` tells which.
    """
    with opened(path, content, max_pixels) as image:
        image.seek(0)
        image.load()
        turn = turn_of(image)
        return to_rgb(image if turn is None else image.transpose(turn), ground)


@contextmanager
def opened(path: str | Path, content: bytes | None = None, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """Yields the image, not yet decoded. Errors of Pillow in the block become a ``DataError``; see ``open_image``."""
    path = Path(path)
    try:
        there = content is not None or path.is_file()
    except OSError:  # a name that is too long, a folder without permission
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
        raise DataError("not an image", f"'{path}': expected the content of {', '.join(FORMATS)}") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DataError(
            "huge image",
            f"'{path}': {error}; at most {max_pixels:,} are decoded: save it smaller, or raise data.max_pixels",
        ) from error
    except MemoryError:
        raise
    except Exception as error:
        if "MAX_TEXT_" in str(error):  # Pillow's limits for text in a PNG do not have an error type of their own
            raise DataError("huge metadata", f"'{path}': {error}; save it without its text chunks") from error
        # For damaged bytes, Pillow's decoders raise many types: RuntimeError, TypeError ...
        raise DataError("broken image", f"'{path}': {error or type(error).__name__}; fetch it again") from error


def _where_it_ends(path: Path) -> str:
    """A message that tells which part of a path exists, to find a wrong folder or a missing archive."""
    full = path.absolute()
    there = next(folder for folder in full.parents if os.path.isdir(folder))  # noqa: PTH112 - never raises
    start = f" ('{path}' is relative to the current folder)" if full != path else ""
    return (
        f"'{full}' is not a file{start}; its last existing folder is '{there}'. Image paths in rows are relative "
        "to the 'images' folder of their source: check that folder, and that all archives are unpacked there"
    )


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """The operation that makes the image upright, by its EXIF tag; None if it is upright or its metadata is broken."""
    try:
        return _TURNS.get(int(image.getexif().get(ExifTags.Base.Orientation, 1)))
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, struct.error):
        return None


@cache
def _formats() -> tuple[str, ...]:
    """The entries of ``FORMATS`` that this build of Pillow supports."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _refused_format(path: Path, content: bytes | None) -> str | None:
    if content is None:
        with path.open("rb") as file:
            content = file.read(16)
    start = content.lstrip()
    return next((name for magic, name in _REFUSED.items() if start.startswith(magic)), None)


def to_rgb(image: Image.Image, ground: tuple[int, int, int] | None = WHITE) -> Image.Image:
    """A decoded image of any mode as RGB, by the rules of ``open_image``; one that is RGB is returned itself."""
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
    """A gray image of 16 or 32 bits or floats, scaled to 8 bits by the rule in ``open_image``."""
    values = np.asarray(image if image.mode == "F" else image.convert("I"), dtype=np.float64)
    finite = np.isfinite(values)
    if not finite.any():
        raise ValueError("none of its values is finite")
    low, high = float(values[finite].min()), float(values[finite].max())
    top = next((top for top in _RANGES[image.mode != "F" :] if high <= top), None)
    if low >= 0 and top is not None and high >= top / 4:
        low, high = 0.0, top
    elif low == high:
        low = min(low, 0.0)
    values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    scaled = (values - low) / ((high - low) / 255 or 1.0)
    return Image.fromarray((scaled + 1e-9).clip(0, 255).astype(np.uint8))
