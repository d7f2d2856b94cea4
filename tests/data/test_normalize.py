"""An image becomes what its name says, the same for every decoder; a valid one keeps its bytes."""

from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from tests.data.test_images import encoded
from visper.common.errors import DataError
from visper.data.checks.image_files import look
from visper.data.decoding import open_image
from visper.data.normalize import make_canonical, mislabeled, reencode

NOISE = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
SMOOTH = Image.fromarray(NOISE).resize((8, 6)).resize((40, 30), Image.Resampling.BICUBIC)


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def see_through() -> Image.Image:
    """A palette whose first color is transparent."""
    image = SMOOTH.quantize(16)
    image.info["transparency"] = 0
    return image


DEEP = Image.fromarray((NOISE[..., 0].astype(np.uint16) << 8) + 7)
FAULTS = {
    "palette with transparency": (encoded(see_through(), "PNG", transparency=0), "PNG under .jpg"),
    "transparency": (encoded(SMOOTH.convert("RGBA"), "PNG"), "PNG under .jpg"),
    "gray with transparency": (encoded(SMOOTH.convert("LA"), "PNG"), "PNG under .jpg"),
    "16-bit PNG": (encoded(DEEP, "PNG"), "PNG under .jpg"),
    "16-bit TIFF": (encoded(DEEP, "TIFF"), "TIFF under .jpg"),
    "one bit": (encoded(SMOOTH.convert("1"), "PNG"), "PNG under .jpg"),
    "GIF": (encoded(SMOOTH.convert("P"), "GIF"), "GIF under .jpg"),
    "animated GIF": (encoded(SMOOTH.convert("P"), "GIF", save_all=True, append_images=[Image.new("P", (40, 30))]),
                     "GIF under .jpg"),
    "WebP with transparency": (encoded(SMOOTH.convert("RGBA"), "WEBP"), "WEBP under .jpg"),
    "BMP": (encoded(SMOOTH, "BMP"), "BMP under .jpg"),
    "CMYK JPEG": (encoded(SMOOTH.convert("CMYK"), "JPEG"), "CMYK colors"),
    "turned CMYK JPEG": (encoded(SMOOTH.convert("CMYK"), "JPEG", exif=turned(6)), "CMYK colors"),
    **{f"turned JPEG {n}": (encoded(SMOOTH, "JPEG", exif=turned(n)), "turned by a tag") for n in range(2, 9)},
}  # fmt: skip


@pytest.mark.parametrize("kind", FAULTS)
def test_every_odd_image_becomes_an_upright_jpeg_of_the_same_look(tmp_path: Path, kind: str) -> None:
    content, fault = FAULTS[kind]
    file = tmp_path / "staged"
    file.write_bytes(content)
    before = open_image(file)
    assert make_canonical(file, "a/b.jpg") == fault
    with Image.open(file) as made:
        assert (made.format, made.mode, made.size) == ("JPEG", "RGB", before.size)
        assert made.getexif().get(ExifTags.Base.Orientation) is None
        difference = np.abs(np.asarray(made, dtype=int) - np.asarray(before, dtype=int))
    # JPEG rounds, most of all noise (one bit, 16 bits, a palette's steps); a wrong turn or color is some 50 apart.
    assert difference.mean() < 12
    assert make_canonical(file, "a/b.jpg") is None, "twice changes nothing"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jpg", encoded(SMOOTH, "JPEG")),
        ("a.JPEG", encoded(SMOOTH.convert("L"), "JPEG")),
        ("a.jpg", encoded(SMOOTH, "JPEG", exif=turned(1))),
        ("a.jpg", encoded(SMOOTH, "MPO")),
        ("a.png", FAULTS["16-bit PNG"][0]),
        ("a", FAULTS["GIF"][0]),
    ],
)
def test_a_sound_image_keeps_its_bytes(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    assert make_canonical(tmp_path / "a", name) is None
    assert (tmp_path / "a").read_bytes() == content


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "empty image file"), (b"<html>", "not an image"), (FAULTS["GIF"][0][:-90], "broken image")],
)
def test_what_cannot_be_decoded_is_named_and_left(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(DataError) as error:
        make_canonical(tmp_path / "a.jpg", "a.jpg")
    assert error.value.reason == reason and (tmp_path / "a.jpg").read_bytes() == content


@pytest.mark.parametrize(
    ("content", "name", "expected"),
    [
        ("JPEG", "a.JPG", False),
        ("MPO", "a.jpg", False),
        ("MPO", "a.mpo", False),
        ("GIF", "a.jpg", True),
        ("JPEG", "a.png", True),
        ("JPEG", "a.dat", False),
        ("JPEG", "a", False),
    ],
)
def test_only_a_name_that_promises_can_be_wrong(content: str, name: str, expected: bool) -> None:
    assert mislabeled(content, name) is expected


def test_a_jpeg_named_png_becomes_one(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(SMOOTH, "JPEG"))
    assert look(str(tmp_path / "a.png")).mislabeled("a.png")
    reencode(tmp_path / "a.png", "a.png", tmp_path / "a.png")
    assert not look(str(tmp_path / "a.png")).mislabeled("a.png")
