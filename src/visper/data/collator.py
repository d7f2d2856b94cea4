"""Samples become batches: right padding, and the pixels of the images that the rows show.

Shapes: B = rows, L = tokens, S = images of all rows, in order; H and W = pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from typing_extensions import Required

from visper.data.chat import IGNORED
from visper.data.images import stacked
from visper.data.rows.records import Drop
from visper.data.vlm import ModelInputs

Preprocess = Callable[[Tensor], Tensor]
"""A teacher's: an image ``[3, H, W]`` uint8 -> ``[3, h, w]``."""


@dataclass(frozen=True)
class Sample:
    """One row ready to be batched.

    Attributes:
        image_tokens: of each of its images, how many of ``input_ids`` are its image tokens.
        pixel_values: ``[images, 3, H, W]`` uint8; None without images, or where a model's own processor makes them.
        images: what the student sees of each, where it has a processor of its own.
        seen: what teachers see of each, ``[3, h, w]`` uint8; or
        stored: their stored targets by task, ``[images, bytes]``.
        image_places: ``[image tokens, 2]``, what these show where part of the square is padding (see ``Batch``).
        image_ids: of each image a number that its content alone decides (``image_id``).
        source: number of the source that the row is from.
    """

    id: str
    input_ids: list[int]
    labels: list[int]
    image_tokens: tuple[int, ...] = ()
    pixel_values: Tensor | None = None
    images: tuple[Image.Image, ...] = ()
    seen: tuple[Tensor, ...] = ()
    stored: Mapping[str, Tensor] | None = None
    truncated: bool = False
    image_places: Tensor | None = None
    image_ids: tuple[int, ...] = ()
    source: int = 0


@dataclass(frozen=True)
class Sizes:
    """Of a batch, known to the host, so that nobody has to ask a GPU for them.

    Attributes:
        lengths: tokens of each sample, padding left out.
        supervised: tokens that the loss counts.
        image_tokens: tokens of all images.
        pairs: pairs of tokens of one sample, that may see each other or may not.
    """

    lengths: tuple[int, ...]
    supervised: int
    image_tokens: int
    pairs: int

    @property
    def tokens(self) -> int:
        """Tokens of all samples."""
        return sum(self.lengths)

    @classmethod
    def of(cls, lengths: Sequence[int], labels: Tensor, image_tokens: Tensor) -> Sizes:
        """Of samples that share no tokens; ``labels`` are ``[B, L]``."""
        supervised = int((labels[:, 1:] != IGNORED).sum())
        return cls(tuple(lengths), supervised, int(image_tokens.sum()), sum(length**2 for length in lengths))


class Batch(TypedDict, total=False):
    """What the model, the objective and the trainer are given."""

    input_ids: Required[Tensor]  # [B, L] long
    labels: Required[Tensor]  # [B, L] long, -100 where unsupervised
    attention_mask: Required[Tensor]  # [B, L] long
    # T = supervised tokens, in order. They are found here, because a GPU would make the host wait for their number.
    supervised_at: Required[Tensor]  # [T] long: where the state that predicts each lies, in rows laid end to end
    sources: Required[Tensor]  # [T] long: the source of the row of each
    # Packed batches only, as transformers names them:
    position_ids: Tensor  # [1, T] long, from 0 in every sample
    cu_seq_lens_q: Tensor  # [samples + 1] int32: where each sample begins, and T
    cu_seq_lens_k: Tensor  # the same
    max_length_q: int  # tokens of the longest sample
    max_length_k: int  # the same
    lengths: tuple[int, ...]  # tokens of each sample
    prefixes: tuple[int, ...]  # joined batches only: tokens of each sample that all its conversations share
    branches: Tensor  # [1, T] long, joined batches only: 0 in what all conversations of a sample share, else which one
    pixel_values: Tensor  # [S, 3, H, W] uint8, normalized by the model; absent if no row has an image
    # Of a model with its own processor, in place of pixel_values: what its forward reads, by its own names.
    model_inputs: dict[str, Tensor]
    image_rows: Required[Tensor]  # [S] long, ascending: the row that shows each image
    image_tokens: Required[Tensor]  # [S] long: how many image tokens each has in its row
    image_ids: Required[Tensor]  # [S] long: equal for equal images
    # Found from the ids by ``training.positions``:
    image_at: Tensor  # [image tokens] long: where they lie, in rows laid end to end
    readings: dict[str, Any]  # task -> ``distillation.reading.Reading``; none in a batch without images
    # Where tokens are no square grid: [image tokens, 2] float32, the point (x, y) in 0..1 that each shows, or NaN.
    image_places: Tensor
    # task -> images [S, 3, h, w] for its teacher, which normalizes uint8, or stored targets [S, bytes] uint8
    teacher_images: dict[str, Tensor]
    sample_ids: Required[list[str]]  # B names
    dropped: Required[list[Drop]]  # rows found bad while loading; they are in no tensor
    num_truncated: Required[int]  # rows whose text was cut
    sizes: Required[Sizes]


@dataclass
class Collator:
    """Builds a ``Batch``; picklable, so that loader processes can hold it.

    Args:
        pad_token_id: fills rows on the right, never attended.
        teachers: task -> that teacher's preprocessing of an image.
        as_student: tasks whose teacher is given the very bytes that the student is: they are made and sent once.
        model_inputs: of a model with its own processor, what makes its inputs.
    """

    pad_token_id: int
    teachers: Mapping[str, Preprocess] = field(default_factory=dict)
    model_inputs: ModelInputs | None = None
    as_student: frozenset[str] = frozenset()

    def __call__(self, items: Sequence[Sample | Drop]) -> Batch:
        """Batches the good rows and passes on the bad ones' names.

        A batch of nothing but bad rows is one unsupervised padding token: every rank still takes its step.
        """
        dropped = [item for item in items if isinstance(item, Drop)]
        samples = [item for item in items if isinstance(item, Sample)]
        if not samples:
            samples = [Sample("none", [self.pad_token_id], [IGNORED])]
        labels = _padded([s.labels for s in samples], IGNORED)
        image_tokens = torch.tensor([tokens for s in samples for tokens in s.image_tokens], dtype=torch.long)
        batch: Batch = {
            "input_ids": _padded([s.input_ids for s in samples], self.pad_token_id),
            "labels": labels,
            "attention_mask": _padded([[1] * len(s.input_ids) for s in samples], 0),
            "supervised_at": supervised_places(labels),
            "sources": sources_of(samples),
            "image_rows": torch.tensor([i for i, s in enumerate(samples) for _ in s.image_tokens], dtype=torch.long),
            "image_tokens": image_tokens,
            "image_ids": torch.tensor([number for s in samples for number in s.image_ids], dtype=torch.long),
            "sample_ids": [s.id for s in samples],
            "dropped": dropped,
            "num_truncated": sum(s.truncated for s in samples),
            "sizes": Sizes.of([len(s.input_ids) for s in samples], labels, image_tokens),
        }
        pixels = [s.pixel_values for s in samples if s.pixel_values is not None]
        if pixels:
            batch["pixel_values"] = torch.cat(pixels)
        if self.model_inputs is not None:
            shown = [s.images for s in samples if s.images]
            batch["model_inputs"] = self.model_inputs(batch["input_ids"], shown)
            of_images = self.model_inputs.places(shown, batch["image_tokens"].tolist(), batch["model_inputs"])
            if of_images is not None:
                batch["image_places"] = of_images
        if len(batch["image_rows"]):
            places = [s.image_places for s in samples if s.image_places is not None]
            if places:
                batch["image_places"] = torch.cat(places)
            stored = [s.stored for s in samples if s.stored is not None]
            if stored:
                batch["teacher_images"] = {task: torch.cat([own[task] for own in stored]) for task in stored[0]}
            elif self.teachers:
                images = [image for s in samples for image in s.seen]
                batch["teacher_images"] = {
                    task: batch["pixel_values"]
                    if task in self.as_student
                    else stacked([preprocess(image) for image in images])
                    for task, preprocess in self.teachers.items()
                }
        return batch


def supervised_places(labels: Tensor) -> Tensor:
    """``[T]``: where the states that predict supervised tokens lie, with the rows of ``[B, L]`` laid end to end."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten().ne(IGNORED).nonzero().squeeze(1)


def sources_of(samples: Sequence[Sample]) -> Tensor:
    """``[T]``: the source of each supervised token."""
    counts = [sum(label != IGNORED for label in sample.labels[1:]) for sample in samples]
    return torch.tensor([sample.source for sample in samples]).repeat_interleave(torch.tensor(counts))


def _padded(rows: list[list[int]], value: int) -> Tensor:
    return pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True, padding_value=value)
