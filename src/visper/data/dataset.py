"""Records as a map-style dataset, and the look at every row before the first step.

A row that turns out bad when it is read becomes a ``Drop`` in its place: indices never shift, so the order, resuming
and the ranks' step stay what they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.progress import track
from torch.utils.data import Dataset

from visper.data.chat import ConversationEncoder
from visper.data.collator import Sample
from visper.data.images import arrange, background_of, geometry_of, open_image, student_pixels
from visper.data.records import DataError, Drop, DropList, Record

CHARACTERS_PER_TOKEN = 4  # of English text; good enough to put rows of similar length side by side


class ConversationDataset(Dataset[Sample | Drop]):
    """Encodes row i when it is asked for.

    Args:
        records: the rows.
        encoder: makes their tokens; its processor's image processor makes the pixels, in its geometry.
    """

    def __init__(self, records: Sequence[Record], encoder: ConversationEncoder) -> None:
        self.records = records
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
            image = open_image(record.image)
        except DataError as error:
            return Drop(record.id, error.reason, error.detail)
        return Sample(
            record.id,
            encoded.input_ids,
            encoded.labels,
            pixel_values=student_pixels(self.image_processor, image),
            picture=arrange(image, self.geometry, self.background),
            truncated=encoded.truncated,
        )

    @property
    def has_image(self) -> list[bool]:
        """Which rows show an image."""
        return [record.image is not None for record in self.records]

    def estimated_lengths(self) -> list[int]:
        """Tokens of each row by its characters, without tokenising."""
        image = self.encoder.num_image_tokens
        return [
            sum(len(turn.text) for turn in record.turns) // CHARACTERS_PER_TOKEN + image * (record.image is not None)
            for record in self.records
        ]


@dataclass(frozen=True)
class Survey:
    """What a look at every row found: the good rows, their lengths in tokens, and how many had text cut."""

    records: list[Record]
    lengths: list[int]
    num_truncated: int


def survey(
    records: Sequence[Record], encoder: ConversationEncoder, drops: DropList, decode: bool = False, quiet: bool = False
) -> Survey:
    """Looks at every row before training: encodes its text, finds its image; bad rows go to ``drops``.

    Args:
        records: the rows that could be read.
        encoder: the run's.
        drops: takes the bad rows; ``drops.check`` then applies the limit.
        decode: also decode every image (slow: a broken image is otherwise met, and skipped, when its turn comes).
        quiet: no progress bar.
    """
    good, lengths, truncated = [], [], 0
    for record in track(records, description="checking rows", disable=quiet):
        try:
            encoded = encoder.encode(record)
            if record.image is not None:
                _check_image(Path(record.image), decode)
        except DataError as error:
            drops.add(record.id, error.reason, error.detail)
            continue
        good.append(record)
        lengths.append(len(encoded.input_ids))
        truncated += encoded.truncated
    return Survey(good, lengths, truncated)


def _check_image(path: Path, decode: bool) -> None:
    if decode or not path.is_file() or path.stat().st_size == 0:
        open_image(path)
