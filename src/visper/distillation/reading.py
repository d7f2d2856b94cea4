"""Readings: the positions in a batch that each task reads, and their places on the images.

A reading depends on the token ids alone. On a GPU, computing it would make the host wait for counts several times per
micro-batch, so the data loader's workers compute it (``training.positions``) and it is part of the batch.

Shape suffixes: S = images, L = sequence, K = positions read of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from visper.config import Position
from visper.distillation.alignment import TokenPlaces
from visper.distillation.heads import query_source
from visper.distillation.layout import Positions, TokenLayout
from visper.distillation.task import DistilledTask


@dataclass(frozen=True)
class Reading:
    """The positions that a task reads in a batch.

    Attributes:
        positions: positions of the states that the task's heads read.
        places: for token heads at image tokens, the places of these tokens on the image.
        chosen: ``[S, L]``, True at the states whose mean is the query; None: the query is not a mean of states.
    """

    positions: Positions
    places: TokenPlaces | None = None
    chosen: Tensor | None = None

    @property
    def mask(self) -> Tensor | None:
        """``[S, K]``, True at tokens that make a prediction; None: all do."""
        return self.positions.mask if self.places is None else self.places.mask

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Reading:
        """A copy on ``device``; accelerate calls this for members of a batch that are not tensors."""
        moved: Reading = _changed(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))
        return moved

    def pin_memory(self) -> Reading:
        """A copy in page-locked memory; torch's DataLoader calls this."""
        pinned: Reading = _changed(self, Tensor.pin_memory)
        return pinned


def readings_of(tasks: Mapping[str, DistilledTask], layout: TokenLayout, text_keys: bool = True) -> dict[str, Reading]:
    """The reading of every task; empty if there are no images.

    Args:
        text_keys: whether resamplers at task tokens also read the text after the image.

    Raises:
        ValueError: an image has no tokens of a task that reads them, or the places of its tokens are unknown.
    """
    if not len(layout.rows):
        return {}
    return {name: reading_of(task, name, layout, text_keys) for name, task in tasks.items()}


def reading_of(task: DistilledTask, name: str, layout: TokenLayout, text_keys: bool = True) -> Reading:
    """The reading of one task; see ``readings_of``."""
    at_tokens = task.at is Position.TASK_TOKENS
    own = layout.own_tokens(name) if at_tokens else None
    if task.head.kind == "resampler":
        if at_tokens:
            positions = layout.keys(name, text_keys)
        else:
            positions = layout.sequence() if task.at is Position.SEQUENCE else layout.image_positions()
        by_states = query_source(task.head, task.target) == "states"
        chosen = own if own is not None else layout.own_image_tokens()
        return Reading(positions, chosen=chosen if by_states else None)
    if own is not None:
        return Reading(Positions.of(layout.rows, own))
    positions = layout.image_positions()
    return Reading(positions, None if task.own else TokenPlaces.of(layout, positions))


def _changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with ``change`` applied to every tensor in it."""
    if isinstance(value, Tensor):
        return change(value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _changed(getattr(value, field.name), change) for field in fields(value)})
    return value
