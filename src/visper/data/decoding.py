"""Picture files decoded: upright RGB, whatever their mode, orientation tag or name say. Needs no torch."""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import ExifTags, Image, UnidentifiedImageError

from visper.common.errors import DataError

# EXIF's orientation tag -> what makes the picture upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(path: str | Path, content: bytes | None = None) -> Image.Image:
    """Opens and decodes a picture: upright RGB, whatever its mode, orientation tag or file name say.

    The content decides about the format (GIF under .jpg occurs; its first frame is taken). Transparency is dropped,
    16-bit gray is scaled to 8.

    Args:
        path: the file, or the name of a picture whose ``content`` is at hand.
        content: of a picture that a source holds.

    Raises:
        DataError: the file is missing, empty, truncated or no picture; ``reason`` tells which.
    """
    with opened(path, content) as image:
        image.seek(0)
        image.load()
        turn = turn_of(image)
        return _to_rgb(image if turn is None else image.transpose(turn))


@contextmanager
def opened(path: str | Path, content: bytes | None = None) -> Iterator[Image.Image]:
    """The picture, not yet decoded; what goes wrong with it inside becomes a ``DataError``; see ``open_image``."""
    path = Path(path)
    try:
        there = content is not None or path.is_file()
    except OSError:  # a name that is too long, a folder that may not be entered
        there = False
    if not there:
        raise DataError(
            "missing image", f"'{path}': expected a file; are all archives unpacked under the images folder?"
        )
    if not (path.stat().st_size if content is None else content):
        raise DataError("empty image file", f"'{path}' has no bytes: fetch it again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path if content is None else io.BytesIO(content)) as image:
                yield image
    except UnidentifiedImageError as error:
        raise DataError("not an image", f"'{path}': its content is no known image format") from error
    except Image.DecompressionBombWarning as error:
        raise DataError("huge image", f"'{path}': {error}") from error
    except MemoryError:
        raise
    except Exception as error:  # given odd bytes, Pillow's many decoders raise anything: RuntimeError, TypeError ...
        raise DataError("broken image", f"'{path}': {error or type(error).__name__}; fetch it again") from error


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """What makes the picture upright, by its EXIF tag; None: it is, or its metadata are broken."""
    try:
        return _TURNS.get(int(image.getexif().get(ExifTags.Base.Orientation, 1)))
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, struct.error):
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit gray: Pillow's own conversion clips at 255 instead of scaling
        image = image.convert("I").point(lambda value: value / 257).convert("L")
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
