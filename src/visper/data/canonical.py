"""Pictures under a .jpg name become what it says: upright, 8-bit, RGB or grey JPEG. Sound ones keep their bytes.

OCR-VQA holds GIF and PNG content under .jpg names; phone cameras turn by a tag; CMYK and 16-bit files trip decoders.
"""

from __future__ import annotations

import struct
import warnings
from pathlib import Path

from PIL import ExifTags, Image, UnidentifiedImageError

from visper.data.records import DataError

QUALITY = 95
"""Of re-encoded pictures, without chroma subsampling; the same Pillow gives the same bytes."""


def make_canonical(path: Path, name: str) -> str | None:
    """Rewrites the picture at ``path`` if its content is not what ``name`` promises; says what was wrong, or None.

    Raises:
        DataError: the content is no picture that can be decoded; ``path`` is left as it is.
    """
    if Path(name).suffix.lower() not in (".jpg", ".jpeg"):
        return None
    fault = _fault(path, name)
    if fault is not None:
        from visper.data.images import open_image  # brings torch: seconds, for the few that need it

        open_image(path).save(path, format="JPEG", quality=QUALITY, subsampling=0)
    return fault


def _fault(path: Path, name: str) -> str | None:
    if path.stat().st_size == 0:
        raise DataError("empty image file", f"'{name}' has no bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.format not in ("JPEG", "MPO"):  # MPO: a JPEG with more pictures behind it
                    return f"{image.format} under .jpg"
                if image.mode not in ("RGB", "L"):
                    return f"{image.mode} colours"
                return "turned by a tag" if _orientation(image) in range(2, 9) else None
    except UnidentifiedImageError as error:
        raise DataError("not an image", f"'{name}': its content is no known image format") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError("broken image", f"'{name}': {error}") from error


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, struct.error):
        return 1  # broken metadata of a sound picture
