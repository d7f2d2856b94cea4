"""Re-encodes images named .jpg that are not upright 8-bit RGB or gray JPEGs. Other files keep their bytes.

OCR-VQA contains GIF and PNG files named .jpg, phone cameras store rotation as a tag, and some decoders fail on CMYK and
16-bit files.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from visper.data.decoding import open_image, opened, turn_of

QUALITY = 95
"""JPEG quality of re-encoded images, without chroma subsampling; the same Pillow version gives the same bytes."""
_SAME = {"MPO": "JPEG"}  # a camera's JPEG, followed by further images


def mislabeled(content: str, name: str) -> bool:
    """Whether an image of the format ``content`` (Pillow's name) has the extension of another format."""
    promised = _promised(name)
    return promised is not None and _SAME.get(content, content) != promised


def make_canonical(path: Path, name: str) -> str | None:
    """Re-encodes the image at ``path`` if ``name`` is a JPEG's but the content is not an upright RGB or gray JPEG.

    Returns:
        What was wrong, or None.

    Raises:
        DataError: the image cannot be decoded; ``path`` is left unchanged.
    """
    if _promised(name) != "JPEG":
        return None
    with opened(path) as image:
        fault = _fault(image, name)
    if fault is not None:
        reencode(path, name, path)
    return fault


def reencode(source: Path, name: str, target: Path) -> None:
    """Writes the first frame of ``source`` to ``target`` as upright RGB, in the format of ``name``'s extension.

    Raises:
        DataError: ``source`` is not an image; nothing is written.
    """
    promised = _promised(name) or "JPEG"
    options = {"quality": QUALITY, "subsampling": 0} if promised == "JPEG" else {}
    open_image(source).save(target, format=promised, **options)


def _promised(name: str) -> str | None:
    """The format of a name's extension; None for an unknown extension."""
    found = Image.registered_extensions().get(Path(name).suffix.lower())
    return None if found is None else _SAME.get(found, found)


def _fault(image: Image.Image, name: str) -> str | None:
    content = str(image.format)
    if mislabeled(content, name):
        return f"{content} under {Path(name).suffix.lower()}"
    if image.mode not in ("RGB", "L"):
        return f"{image.mode} colors"
    return None if turn_of(image) is None else "turned by a tag"
