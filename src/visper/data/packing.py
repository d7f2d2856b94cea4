"""All samples of a micro-batch in one row, without padding: the same samples and losses, fewer tokens to work through.

Which samples meet in a step, and what the loss is divided by, stay what they were; neither seed, epoch, workers nor
processes have a say in how a micro-batch is laid out. Positions start again with every sample.

Shapes: B = samples, L = tokens of the longest, T = tokens of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from visper.data.chat import IGNORED
from visper.data.collator import Batch, Collator, Sample
from visper.data.rows.records import Drop


@dataclass
class PackingCollator:
    """A ``Collator`` whose batches are packed; picklable like it."""

    collator: Collator

    def __call__(self, items: Sequence[Sample | Drop]) -> Batch:
        """``[1, T]`` instead of ``[B, L]``, with ``position_ids`` and ``sample_lengths``."""
        return pack(self.collator(items))


def pack(batch: Batch) -> Batch:
    """``batch`` ``[B, L]``, padded on the right, as one row ``[1, T]``; samples and images keep their order.

    The first token of a sample is no label: the token before it belongs to another.
    """
    assert "teacher_images" not in batch, "predictors read rows of one sample"
    real = batch["attention_mask"].bool()
    labels = batch["labels"].clone()
    labels[:, 0] = IGNORED
    places = torch.arange(real.shape[1]).expand_as(real)
    return {
        **batch,
        "input_ids": batch["input_ids"][real][None],
        "labels": labels[real][None],
        "attention_mask": batch["attention_mask"][real][None],
        "position_ids": places[real][None],
        "sample_lengths": real.sum(1).tolist(),
        "image_rows": torch.zeros_like(batch["image_rows"]),
    }
