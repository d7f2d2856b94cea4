"""Draws each tapped layer's prediction for an image beside the teacher's target."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from visper.common.errors import ConfigError, DataError
from visper.config import Data
from visper.data.checks.digests import contents_of
from visper.data.images import arrange, background_of, open_image
from visper.data.rows.records import DropList
from visper.data.rows.sources import open_records
from visper.data.rows.table import Records
from visper.data.sets.catalog import row_files
from visper.data.vlm import seen_geometry
from visper.distillation import Teacher
from visper.distillation.teachers.unclip import nearest
from visper.evaluation.contact_sheet import Tile, contact_sheet, images_of
from visper.evaluation.predictions import (
    PreTrained,
    layer_of,
    predict_images,
    predicts_target,
    task_of,
    teacher_targets,
)

PROMPT = "Describe the image concisely."
"""The prompt beside the image, as in LLaVA-558K."""

GALLERY = 64
"""Number of images among which the nearest are searched, for embeddings that cannot be drawn."""

SIDE = 384
BLANK = Image.new("RGB", (1, 1), "white")


def look(
    found: PreTrained, image: Image.Image, prompt: str = PROMPT, gallery: Sequence[Image.Image] = ()
) -> Image.Image:
    """One row per task: the image as the student sees it, then drawings of the teacher's target and each prediction.

    Args:
        gallery: images among which the nearest are shown if a teacher cannot draw (a target of one token has no
            positions); without any, an empty tile says so.
    """
    predicted = predict_images(found.model, [image], prompt)
    seen, *others = (_arranged(found, one) for one in (image, *gallery))
    rows: list[list[Tile]] = []
    assert found.model.objective is not None
    for task in found.model.objective.tasks:
        layers = {layer_of(name): value for name, value in predicted.items() if task_of(name) == task}
        teacher = found.teachers.get(task)
        if teacher is None or not all(predicts_target(value, teacher) for value in layers.values()):
            rows.append([("image", seen), (f"{task}: does not predict a teacher's target, not drawable", BLANK)])
            continue
        target = teacher_targets(teacher, [seen])
        embeddings = torch.cat((target, *layers.values()))
        if not teacher.draws_images and not others:
            shape = f"{teacher.spec.tokens} x {teacher.spec.width}"
            rows.append([("image", seen), (f"{task}: {shape}, not drawable: see --gallery", BLANK)])
            continue
        if teacher.draws_images:
            drawn, how = _drawn(teacher, embeddings, target, seen), ""
        else:
            drawn, how = _nearest(teacher, embeddings, others), f", nearest of {len(others)}"
        captions = [f"{task}: teacher{how}", *(f"{task}: layer {layer}{how}" for layer in layers)]
        rows.append([("image", seen), *zip(captions, drawn, strict=True)])
    return contact_sheet(rows, SIDE)


def needs_gallery(found: PreTrained) -> bool:
    """Whether a teacher of the run cannot draw images."""
    return not all(teacher.draws_images for teacher in found.teachers.values())


def first_images(data: Data, count: int = GALLERY) -> list[Image.Image]:
    """The first ``count`` images of a run's rows; fewer or none if they no longer exist."""
    try:
        records = open_records(row_files(data), DropList())
    except (ConfigError, DataError, OSError):
        return []
    return _opened(_images_of(records), count)


def folder_gallery(folder: Path, count: int = GALLERY) -> list[Image.Image]:
    """The first ``count`` images of a folder, by name. Raises DataError if it has none."""
    images = _opened(((file, None) for file in sorted(folder.rglob("*")) if file.is_file()), count)
    if not images:
        raise DataError("no images", f"no image can be read in '{folder}': give a folder with images")
    return images


def _images_of(records: Records) -> Iterator[tuple[Path, bytes | None]]:
    """Each image once, with its content; skips images outside their folder."""
    seen: set[tuple[int | None, str]] = set()
    for index, record in enumerate(records):
        # The names of embedded images are those of their source.
        source = records.source(index) if records.place(index)[0].images is None else None
        new = [number for number, image in enumerate(record.images) if (source, image.path) not in seen]
        seen |= {(source, image.path) for image in record.images}
        try:
            contents = contents_of(records, index) if new else []
        except DataError:
            continue
        yield from ((Path(record.images[number].path), contents[number]) for number in new)


def _opened(places: Iterable[tuple[Path, bytes | None]], count: int) -> list[Image.Image]:
    images: list[Image.Image] = []
    for path, content in places:
        if len(images) == count:
            break
        try:
            images.append(open_image(path, content))
        except DataError:
            continue
    return images


def _arranged(found: PreTrained, image: Image.Image) -> Image.Image:
    processor = found.model.processor
    return arrange(image, seen_geometry(processor), background_of(processor.image_processor))


def _drawn(teacher: Teacher, embeddings: Tensor, target: Tensor, seen: Image.Image) -> list[Image.Image]:
    # One by one: a diffusion or segmentation of all at once would need several times the memory.
    pixels = teacher.see([seen])
    device = next(teacher.parameters(), embeddings).device
    return [images_of(teacher.decode(one[None].to(device), pixels, target))[0] for one in embeddings]


def _nearest(teacher: Teacher, embeddings: Tensor, gallery: Sequence[Image.Image]) -> list[Image.Image]:
    """For each embedding the four nearest images (or the one), best first, in one square."""
    targets = teacher_targets(teacher, gallery)
    shown = []
    for rows in nearest(embeddings, targets, 4 if len(gallery) >= 4 else 1).tolist():
        across = 2 if len(rows) == 4 else 1
        side = SIDE // across
        square = Image.new("RGB", (SIDE, SIDE))
        for place, row in enumerate(rows):
            square.paste(gallery[row].resize((side, side)), (place % across * side, place // across * side))
        shown.append(square)
    return shown
