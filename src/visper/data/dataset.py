"""Records as a map-style dataset, and the look at every row before the first step.

A row that turns out bad when it is read becomes a ``Drop`` in its place: indices never shift, so the order, resuming
and the ranks' step stay what they were.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.utils.data import Dataset

from visper.common.errors import DataError
from visper.common.files import inside
from visper.data.chat import ConversationEncoder
from visper.data.checks.digests import content_of
from visper.data.collator import Sample
from visper.data.images import arrange, background_of, geometry_of, open_image, student_pixels
from visper.data.rows.lengths import Lengths
from visper.data.rows.records import Drop, DropList, Record
from visper.data.rows.table import Records

CHARACTERS_PER_TOKEN = 4  # of English text; good enough to put rows of similar length side by side
THREADS = 32  # that wait for the file system, mostly
StoredTargets = Callable[[bytes], Mapping[str, Tensor]]


class ConversationDataset(Dataset[Sample | Drop]):
    """Encodes row i when it is asked for.

    Args:
        records: the rows.
        encoder: makes their tokens; its processor's image processor makes the pixels, in its geometry.
        stored: the bytes of an image file -> its stored targets, by task, in place of an image for the teachers; raises
            DataError where there are none.
    """

    def __init__(
        self, records: Sequence[Record], encoder: ConversationEncoder, stored: StoredTargets | None = None
    ) -> None:
        self.records = records
        self.stored = stored
        self.encoder = encoder
        self.image_processor = encoder.processor.image_processor
        self.geometry = geometry_of(self.image_processor)
        self.background = background_of(self.image_processor)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample | Drop:
        record = self.records[index]
        try:
            encoded = self.encoder.encode(record)
            if record.image is None:
                return Sample(record.id, encoded.input_ids, encoded.labels, truncated=encoded.truncated)
            held = content_of(self.records, index)  # read once: what is looked up is what is decoded
            image = open_image(record.image, held)
            stored = None if self.stored is None or held is None else self.stored(held)
        except DataError as error:
            return Drop(record.id, error.reason, error.detail)
        return Sample(
            record.id,
            encoded.input_ids,
            encoded.labels,
            pixel_values=student_pixels(self.image_processor, image),
            image=arrange(image, self.geometry, self.background) if stored is None else None,
            stored=stored,
            truncated=encoded.truncated,
        )

    @property
    def has_image(self) -> list[bool]:
        """Which rows show an image."""
        if isinstance(self.records, Records):
            return list(self.records.has_image.tolist())
        return [record.image is not None for record in self.records]

    def estimated_lengths(self) -> list[int]:
        """Tokens of each row by its characters, without tokenizing."""
        if isinstance(self.records, Records):
            characters = self.records.characters
        else:
            characters = np.asarray([sum(len(turn.text) for turn in r.turns) for r in self.records], dtype=np.int64)
        image = self.encoder.num_image_tokens * np.asarray(self.has_image, dtype=np.int64)
        return list((characters // CHARACTERS_PER_TOKEN + image).tolist())


@dataclass(frozen=True)
class Survey:
    """What a look at every row found: the good rows, their lengths in tokens, and how many had text cut.

    ``num_text`` and ``num_unknown`` count each good row's supervised tokens, see ``chat.Encoded``.
    """

    records: Sequence[Record]
    lengths: list[int]
    num_truncated: int
    num_text: npt.NDArray[np.int32]
    num_unknown: npt.NDArray[np.int32]


def keep_good(
    records: Sequence[Record], found: Lengths, lost: Mapping[int, tuple[str, str]], drops: DropList
) -> Survey:
    """The rows without a fault, by ``lengths.measure`` (``found``) and ``lost_images``; the others go to ``drops``."""
    bad = {**lost, **found.problems}
    for index in sorted(bad):
        drops.add(records[index].id, *bad[index])
    kept = np.ones(len(records), dtype=bool)
    kept[list(bad)] = False
    good = records.select(kept) if isinstance(records, Records) else [records[i] for i in np.flatnonzero(kept).tolist()]
    truncated = int(found.truncated[kept].sum())
    return Survey(good, found.lengths[kept].tolist(), truncated, found.num_text[kept], found.num_unknown[kept])


def require_images(records: Sequence[Record]) -> None:
    """Refuses rows of which none shows an image: the projector would be trained by nothing.

    Raises:
        DataError: no row has an image.
    """
    shown = records.has_image.any() if isinstance(records, Records) else any(r.image is not None for r in records)
    if not shown:
        raise DataError(
            "no images",
            f"none of the {len(records)} rows shows an image, but stage 'pt' trains what reads images: rows name "
            "theirs by 'image' or 'images' (docs/data.md), or map your own key by 'columns'",
        )


def lost_images(records: Sequence[Record], found: Lengths, decode: bool = False) -> dict[int, tuple[str, str]]:
    """The rows that can be encoded but whose image file is missing or empty: index -> reason, detail.

    Every file is checked once, however many rows show it; images inside Parquet files were when they were written.
    ``decode``: also decode every image (slow: a broken image is otherwise found, and skipped, when its turn comes).
    """
    places = records.image_places() if isinstance(records, Records) else [_own_place(record) for record in records]
    rows: dict[tuple[Path, str], list[int]] = {}
    for index, place in enumerate(places):
        if place is not None and index not in found.problems:
            rows.setdefault(place, []).append(index)
    with ThreadPoolExecutor(THREADS) as threads:
        sound = list(threads.map(_has_content, rows))
    lost = {}
    for place, looks_sound in zip(rows, sound, strict=True):
        if looks_sound and not decode:
            continue
        try:
            open_image(inside(*place))
        except DataError as error:
            lost.update(dict.fromkeys(rows[place], (error.reason, error.detail)))
    return lost


def _own_place(record: Record) -> tuple[Path, str] | None:
    """Of a record that comes without a folder: its caller's word is taken."""
    return None if record.image is None else (Path(record.image).parent, Path(record.image).name)


def _has_content(place: tuple[Path, str]) -> bool:
    try:
        found = os.stat(inside(*place))  # noqa: PTH116 (a third of the time, for 350,000 files)
    except (OSError, DataError):
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size > 0
