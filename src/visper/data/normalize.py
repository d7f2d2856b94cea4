"""Images become what their name says. Under .jpg: upright, 8-bit, RGB or gray JPEG. Sound ones keep their bytes.

OCR-VQA holds GIF and PNG content under .jpg names; phone cameras turn by a tag; CMYK and 16-bit files trip decoders.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from visper.data.decoding import open_image, opened, turn_of

QUALITY = 95
"""Of re-encoded images, without chroma subsampling; the same Pillow gives the same bytes."""
_SAME = {"MPO": "JPEG"}  # a camera's JPEG with more images behind it


def mislabeled(content: str, name: str) -> bool:
    """Whether an image of the format ``content`` (Pillow's name) has a name that promises another one."""
    promised = _promised(name)
    return promised is not None and _SAME.get(content, content) != promised


def make_canonical(path: Path, name: str) -> str | None:
    """Rewrites the image at ``path`` if ``name`` promises a JPEG and it is none that every decoder reads alike.

    Returns:
        What was wrong, or None.

    Raises:
        DataError: the content is no image that can be decoded; ``path`` is left as it is.
    """
    if _promised(name) != "JPEG":
        return None
    with opened(path) as image:
        fault = _fault(image, name)
    if fault is not None:
        reencode(path, name, path)
    return fault


def reencode(source: Path, name: str, target: Path) -> None:
    """Writes the image in ``source`` to ``target`` in the format that ``name`` promises: first frame, upright RGB.

    Raises:
        DataError: ``source`` is no image; nothing is written.
    """
    promised = _promised(name) or "JPEG"
    options = {"quality": QUALITY, "subsampling": 0} if promised == "JPEG" else {}
    open_image(source).save(target, format=promised, **options)


def _promised(name: str) -> str | None:
    """The format that a name's extension stands for; None: for none."""
    found = Image.registered_extensions().get(Path(name).suffix.lower())
    return None if found is None else _SAME.get(found, found)


def _fault(image: Image.Image, name: str) -> str | None:
    content = str(image.format)
    if mislabeled(content, name):
        return f"{content} under {Path(name).suffix.lower()}"
    if image.mode not in ("RGB", "L"):
        return f"{image.mode} colors"
    return None if turn_of(image) is None else "turned by a tag"
