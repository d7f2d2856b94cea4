"""Records as a map-style dataset, and the check of every row before the first step.

A row that turns out to be bad when it is read is replaced by a ``Drop``, so indices never shift: the order of rows, the
position after a resume and the number of steps per rank do not change.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from visper.common.errors import DataError
from visper.common.files import inside
from visper.config.data import MAX_PIXELS
from visper.data.chat import ConversationEncoder
from visper.data.checks.digests import contents_of, image_id
from visper.data.collator import Sample
from visper.data.images import (
    arrange,
    background_of,
    open_image,
    places_seen,
    rgb_bytes,
    stacked,
    student_bytes,
)
from visper.data.rows.lengths import Lengths
from visper.data.rows.records import Drop, DropList
from visper.data.rows.table import Records
from visper.data.vlm import VlmEncoder, seen_geometry

THREADS = 32  # they mostly wait for the file system
StoredTargets = Callable[[bytes], Mapping[str, Tensor]]


class ConversationDataset(Dataset[Sample | Drop]):
    """Encodes each row on access.

    Args:
        encoder: encodes texts; its processor's image processor makes the pixels, in the processor's geometry.
        stored: the bytes of an image file -> its stored targets by task, used instead of images for the teachers;
            raises DataError if there are none.
        max_pixels: largest image; a row with a larger one becomes a ``Drop``.
    """

    def __init__(
        self,
        records: Records,
        encoder: ConversationEncoder,
        stored: StoredTargets | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.records = records
        self.stored = stored
        self.max_pixels = max_pixels
        self.encoder = encoder
        self.image_processor = encoder.processor.image_processor
        self.own_processor = isinstance(encoder, VlmEncoder)  # it is called in the collator, for a micro-batch
        self.geometry = seen_geometry(encoder.processor)
        self.background = background_of(self.image_processor)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample | Drop:
        record = self.records[index]
        try:
            contents = contents_of(self.records, index) if record.images else []  # read once, hashed and decoded
            pairs = zip(record.images, contents, strict=True)
            images = [open_image(shown.path, held, max_pixels=self.max_pixels) for shown, held in pairs]
            encoded = self.encoder.encode(record, [image.size for image in images])
            stored = [self.stored(held) for held in contents if held is not None] if self.stored is not None else []
        except DataError as error:
            return Drop(record.id, error.reason, error.detail)
        tokens = encoded.input_ids, encoded.labels
        sample = Sample(record.id, *tokens, truncated=encoded.truncated, source=self.records.source(index))
        if not images:
            return sample
        seen = [rgb_bytes(arrange(image, self.geometry, self.background)) for image in images]
        pixels = None
        if not self.own_processor:
            own = [student_bytes(self.image_processor, *shown) for shown in zip(images, seen, strict=True)]
            pixels = stacked(own)
        return replace(
            sample,
            image_tokens=encoded.image_tokens,
            pixel_values=pixels,
            images=tuple(images) if self.own_processor else (),
            seen=() if stored else tuple(seen),
            stored={task: torch.stack([own[task] for own in stored]) for task in stored[0]} if stored else None,
            image_places=places_seen(self.geometry, [image.size for image in images], encoded.image_tokens),
            image_ids=tuple(image_id(held) for held in contents if held is not None),
        )

    @property
    def source_names(self) -> tuple[str, ...]:
        """The names of the sources, by source number; empty for a single source."""
        parts = self.records.parts
        return tuple(part.name for part in parts) if len(parts) > 1 else ()


def keep_good(
    records: Records, found: Lengths, lost: Mapping[int, tuple[str, str]], drops: DropList
) -> tuple[Records, Lengths]:
    """The rows without a fault, and their lengths; those ``lost`` or that cannot be encoded are added to ``drops``."""
    bad = {**lost, **found.problems}
    for index in sorted(bad):
        drops.add(records[index].id, *bad[index])
    kept = np.ones(len(records), dtype=bool)
    kept[list(bad)] = False
    return records.select(kept), found.select(kept)


def require_images(records: Records) -> None:
    """Refuses data without any image, which would not train the projector.

    Raises:
        DataError: no row has an image.
    """
    if not records.has_image.any():
        raise DataError(
            "no images",
            f"none of the {len(records)} rows has an image, but stage 'pt' trains the parts that read images: give "
            "each row an 'image' or 'images' (docs/data.md), or map your own key with 'columns'",
        )


def lost_images(records: Records, found: Lengths) -> dict[int, tuple[str, str]]:
    """The rows that can be encoded but have a missing or empty image file: index -> reason, detail.

    Each file is checked once, however many rows show it; images in Parquet files were checked when these were written.
    Nothing is decoded: a broken image is found, and its row skipped, when the row is read.
    """
    rows: dict[tuple[Path, str], list[int]] = {}
    for index, _, folder, name in records.image_files():
        if index not in found.problems:
            rows.setdefault((folder, name), []).append(index)
    with ThreadPoolExecutor(THREADS) as threads:
        sound = list(threads.map(_has_content, rows))
    lost = {}
    for place, looks_sound in zip(rows, sound, strict=True):
        if looks_sound:
            continue
        try:
            open_image(inside(*place))
        except DataError as error:
            lost.update(dict.fromkeys(rows[place], (error.reason, error.detail)))
    return lost


def _has_content(place: tuple[Path, str]) -> bool:
    try:
        found = os.stat(inside(*place))  # noqa: PTH116 (takes a third of the time; there may be 350,000 files)
    except (OSError, DataError):
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size > 0
