"""Bad picture files are named, odd ones read, and student and teachers see the same pixels."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps, features
from transformers import AutoImageProcessor, CLIPImageProcessor

from visper.common.errors import DataError
from visper.data.images import (
    GEOMETRIES,
    arrange,
    background_of,
    build_image_processor,
    geometry_of,
    open_image,
    output_size,
    student_pixels,
    with_geometry,
)

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def picture(width: int = 40, height: int = 30) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (max(height // 4, 1), max(width // 4, 1), 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "missing image"),
        (b"", "empty image file"),
        (encoded(picture(200, 200))[:2000], "broken image"),
        (encoded(picture(200, 200), "PNG")[:2000], "broken image"),
        (b"<html>404</html>", "not an image"),
    ],
)
def test_a_file_that_is_no_picture_says_why(tmp_path: Path, content: bytes | None, reason: str) -> None:
    file = tmp_path / "a.jpg"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError) as error:
        open_image(file)
    assert error.value.reason == reason
    assert str(file) in str(error.value)


FORMATS = ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", *(["AVIF"] if features.check("avif") else [])]


@pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL")
@pytest.mark.parametrize("kind", FORMATS)
@settings(max_examples=60, deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), max_size=8), kept=st.integers(0, 5000))
def test_no_bytes_whatever_break_more_than_their_row(kind: str, changes: list[tuple[int, int]], kept: int) -> None:
    content = bytearray(encoded(picture(), kind))
    for place, value in changes:
        content[place % len(content)] = value
    try:
        image = open_image("a", bytes(content[: max(1, kept % (2 * len(content)))]))
    except DataError:
        return
    assert image.mode == "RGB"


def test_a_folder_is_no_picture(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing image"):
        open_image(tmp_path)


def test_a_gif_under_a_jpg_name_gives_its_first_frame(tmp_path: Path) -> None:
    red, blue = (Image.new("RGB", (8, 8), color) for color in ("red", "blue"))
    (tmp_path / "a.jpg").write_bytes(encoded(red, "GIF", save_all=True, append_images=[blue]))
    image = open_image(tmp_path / "a.jpg")
    assert image.mode == "RGB" and image.getpixel((3, 3)) == (255, 0, 0)


@pytest.mark.parametrize("mode", ["P", "RGBA", "L", "LA", "1", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    sixteen_bits = Image.fromarray(np.full((30, 40), 40_000, dtype=np.uint16))
    image = sixteen_bits if mode == "I;16" else picture().convert(mode)
    (tmp_path / "a").write_bytes(encoded(image, "TIFF" if mode == "CMYK" else "PNG"))
    opened = open_image(tmp_path / "a")
    assert (opened.mode, opened.size) == ("RGB", (40, 30))
    if mode == "I;16":  # scaled, not clipped to white
        assert opened.getpixel((0, 0)) == (155, 155, 155)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_upright(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    (tmp_path / "a.png").write_bytes(encoded(picture(40, 30), "PNG", exif=exif))
    with Image.open(tmp_path / "a.png") as image:
        expected = ImageOps.exif_transpose(image)
    assert open_image(tmp_path / "a.png").tobytes() == expected.tobytes()


def test_broken_metadata_costs_no_picture(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    content = encoded(picture(), exif=exif)
    (tmp_path / "a.jpg").write_bytes(
        content.replace(b"Exif\0\0MM", b"Exif\0\0XX").replace(b"Exif\0\0II", b"Exif\0\0XX")
    )
    assert open_image(tmp_path / "a.jpg").size == (40, 30)


def test_arranged_pictures_have_the_geometry() -> None:
    image = picture(40, 30)
    assert arrange(image, "squash") is image
    assert arrange(image, "crop").tobytes() == image.crop((5, 0, 35, 30)).tobytes()
    padded = arrange(image, "pad", (1, 2, 3))
    assert padded.size == (40, 40) and padded.getpixel((0, 4)) == (1, 2, 3)
    assert padded.crop((0, 5, 40, 35)).tobytes() == image.tobytes()
    with pytest.raises(ValueError, match="'stretch' is unknown"):
        arrange(image, "stretch")


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("size", [(90, 41), (41, 90), (64, 64)])
def test_teachers_see_the_pixels_that_the_student_sees(geometry: str, size: tuple[int, int]) -> None:
    processor = build_image_processor(geometry, 32, MEAN, STD)
    image = picture(*size)
    student = student_pixels(processor, image)
    squashed = with_geometry(processor, "squash")
    shown_to_teachers = student_pixels(squashed, arrange(image, geometry, background_of(processor)))
    # Squash and pad are the same computation. Crop scales before it cuts, to whole pixels: up to half an output pixel
    # apart. Measured on noise in cells of four pixels: 0.137 standard deviations; without the crop it is over 0.5.
    tolerance = 0.15 if geometry == "crop" else 0.0
    assert (student - shown_to_teachers).abs().mean() <= tolerance
    if geometry == "crop" and image.width != image.height:
        assert (student - student_pixels(squashed, image)).abs().mean() > 0.5


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_saved_processor_sees_what_training_saw(tmp_path: Path, geometry: str) -> None:
    processor = build_image_processor(geometry, 32, MEAN, STD)
    processor.save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    image = picture(90, 41)
    assert torch.equal(loaded(image, return_tensors="pt")["pixel_values"][0], student_pixels(processor, image))
    assert (geometry_of(loaded), output_size(loaded)) == (geometry, 32)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("size", [(1, 1), (40, 1), (40, 3), (3, 40), (200, 2)])
def test_pictures_of_any_shape_become_the_square(geometry: str, size: tuple[int, int]) -> None:
    processor = build_image_processor(geometry, 16, MEAN, STD)
    assert student_pixels(processor, picture(*size)).shape == (3, 16, 16)


def test_a_published_processor_takes_another_geometry() -> None:
    published = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_mean=MEAN)
    assert geometry_of(published) == "crop"
    padded = with_geometry(published, "pad")
    assert (geometry_of(padded), output_size(padded), tuple(padded.image_mean)) == ("pad", 28, MEAN)
