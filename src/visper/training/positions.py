"""Adds token positions to a batch: those of image tokens, and those that each task reads.

The forward pass could find both from the token ids, but on a GPU the host would wait for their number several times per
micro-batch. So the loader's processes compute them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils.data import get_worker_info

from visper.data.collator import Batch, Sample
from visper.data.rows.records import Drop
from visper.data.sending import SentBatch
from visper.distillation import DistilledTask, TokenLayout, readings_of

Collate = Callable[[Sequence[Sample | Drop]], Batch]


@dataclass
class PositioningCollator:
    """Wraps a collator and adds ``image_at`` and, with tasks, ``readings`` to its batches; picklable."""

    collator: Collate
    image_token_id: int
    task_token_ids: Mapping[str, list[int]] = field(default_factory=dict)
    tasks: Mapping[str, DistilledTask] = field(default_factory=dict)
    text_keys: bool = True

    def __call__(self, items: Sequence[Sample | Drop]) -> dict[str, Any]:
        """The collator's batch with ``image_at`` ``[image tokens]`` and ``readings``, by task."""
        batch = self.collator(items)
        batch["image_at"] = image_positions(batch["input_ids"], self.image_token_id)
        if self.tasks:
            layout = TokenLayout.from_ids(
                batch["input_ids"],
                batch["attention_mask"],
                self.image_token_id,
                self.task_token_ids,
                batch["image_rows"],
                batch["image_tokens"],
                samples_of(batch.get("position_ids")),
                batch.get("image_places"),
            )
            batch["readings"] = readings_of(self.tasks, layout, self.text_keys)
        return dict(batch) if get_worker_info() is None else SentBatch(batch)


def image_positions(input_ids: Tensor, image_token_id: int) -> Tensor:
    """Positions ``[image tokens]`` of the image tokens in the flattened ``[B, L]`` ids."""
    return (input_ids == image_token_id).flatten().nonzero().squeeze(1)


def samples_of(position_ids: Tensor | None) -> Tensor | None:
    """Sample number ``[1, L]`` of each token in a packed row, from 1; None for unpacked rows."""
    return None if position_ids is None else (position_ids == 0).cumsum(1)
