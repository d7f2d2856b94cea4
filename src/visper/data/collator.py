"""Collates samples into batches: right padding, and the pixels of all images.

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
"""A teacher's preprocessing: an image ``[3, H, W]`` uint8 -> ``[3, h, w]``."""


@dataclass(frozen=True)
class Sample:
    """One encoded row.

    Attributes:
        image_tokens: number of image tokens of each image in ``input_ids``.
        pixel_values: ``[images, 3, H, W]`` uint8; None without images, or if the model's own processor makes them.
        images: the images, for a model with its own processor.
        seen: the images as teachers see them, ``[3, h, w]`` uint8; empty if ``stored`` is given.
        stored: stored targets by task, ``[images, bytes]``.
        image_places: ``[image tokens, 2]``, what each token shows if part of the square is padding (see ``Batch``).
        image_ids: a number for each image that depends only on its content (``image_id``).
        source: number of the row's source.
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
    """Token counts of a batch, kept on the host so that they need not be read from a GPU.

    ``lengths`` are those of each sample without padding; ``pairs`` counts pairs of tokens within a sample, including
    those that causal attention masks.
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
        """The sizes of samples that share no tokens; ``labels`` are ``[B, L]``."""
        supervised = int((labels[:, 1:] != IGNORED).sum())
        return cls(tuple(lengths), supervised, int(image_tokens.sum()), sum(length**2 for length in lengths))


class Batch(TypedDict, total=False):
    """The input of the model, the objective and the trainer. "Flat" positions are those of all rows concatenated."""

    input_ids: Required[Tensor]  # [B, L] long
    labels: Required[Tensor]  # [B, L] long, -100 where unsupervised
    attention_mask: Required[Tensor]  # [B, L] long
    # T = supervised tokens, in order. They are found here, because a GPU would make the host wait for their number.
    supervised_at: Required[Tensor]  # [T] long: flat position of the state that predicts each supervised token
    sources: Required[Tensor]  # [T] long: the source of each supervised token's row
    # Packed batches only, named as in transformers (here T = all tokens):
    position_ids: Tensor  # [1, T] long, from 0 in every sample
    cu_seq_lens_q: Tensor  # [samples + 1] int32: start of each sample, then T
    cu_seq_lens_k: Tensor  # the same
    max_length_q: int  # tokens of the longest sample
    max_length_k: int  # the same
    lengths: tuple[int, ...]  # tokens of each sample
    prefixes: tuple[int, ...]  # joined batches only: tokens of each sample that all its conversations share
    branches: Tensor  # [1, T] long, joined batches only: number of the token's conversation, 0 for shared tokens
    pixel_values: Tensor  # [S, 3, H, W] uint8, normalized by the model; absent if no row has an image
    # Instead of pixel_values for a model with its own processor: keyword arguments of its forward.
    model_inputs: dict[str, Tensor]
    image_rows: Required[Tensor]  # [S] long, ascending: the row of each image
    image_tokens: Required[Tensor]  # [S] long: number of image tokens of each image
    image_ids: Required[Tensor]  # [S] long: equal for equal images
    # Computed from the ids by ``training.positions``:
    image_at: Tensor  # [image tokens] long: their flat positions
    readings: dict[str, Any]  # task -> ``distillation.reading.Reading``; absent in a batch without images
    # If tokens are not a square grid: [image tokens, 2] float32, the point (x, y) in 0..1 that each shows, or NaN.
    image_places: Tensor
    # task -> uint8 images [S, 3, h, w], which its teacher normalizes, or stored targets [S, bytes] uint8
    teacher_images: dict[str, Tensor]
    sample_ids: Required[list[str]]  # B names
    dropped: Required[list[Drop]]  # rows found bad while loading; not in any tensor
    num_truncated: Required[int]  # rows whose text was cut
    sizes: Required[Sizes]


@dataclass
class Collator:
    """Builds a ``Batch``; picklable for loader processes.

    Args:
        teachers: task -> its teacher's preprocessing.
        model_inputs: makes the inputs of a model with its own processor.
        as_student: tasks whose teacher gets the same bytes as the student, which are then made and sent once.
    """

    pad_token_id: int
    teachers: Mapping[str, Preprocess] = field(default_factory=dict)
    model_inputs: ModelInputs | None = None
    as_student: frozenset[str] = frozenset()

    def __call__(self, items: Sequence[Sample | Drop]) -> Batch:
        """Batches the good rows and lists the bad ones in ``dropped``.

        If all rows are bad, the batch is one unsupervised padding token, so that every rank still takes its step.
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
    """``[T]``: positions of the states that predict supervised tokens, in the flattened ``[B, L]``."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten().ne(IGNORED).nonzero().squeeze(1)


def sources_of(samples: Sequence[Sample]) -> Tensor:
    """``[T]``: the source of each supervised token."""
    counts = [sum(label != IGNORED for label in sample.labels[1:]) for sample in samples]
    return torch.tensor([sample.source for sample in samples]).repeat_interleave(torch.tensor(counts))


def _padded(rows: list[list[int]], value: int) -> Tensor:
    return pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True, padding_value=value)
