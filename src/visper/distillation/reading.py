"""What each task reads of a batch: positions of states, and where on the image these are.

A reading follows from token ids alone. Found on a GPU it would make the host wait for numbers of positions, several
times a micro-batch; so the loader's processes find it (``training.positions``), and it travels with the batch.

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
    """What a task reads of a batch.

    Attributes:
        positions: of the states that its heads are given.
        places: for token heads at image tokens, where on the image these are.
        chosen: ``[S, L]``, True at the states whose mean is the query; None: queries come from elsewhere.
    """

    positions: Positions
    places: TokenPlaces | None = None
    chosen: Tensor | None = None

    @property
    def mask(self) -> Tensor | None:
        """``[S, K]``, True at the tokens that predict something; None: all do."""
        return self.positions.mask if self.places is None else self.places.mask

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Reading:
        """On ``device``; accelerate calls this for what a batch holds beside tensors."""
        moved: Reading = _changed(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))
        return moved

    def pin_memory(self) -> Reading:
        """In page-locked memory; torch's loader calls this."""
        pinned: Reading = _changed(self, Tensor.pin_memory)
        return pinned


def readings_of(tasks: Mapping[str, DistilledTask], layout: TokenLayout, text_keys: bool = True) -> dict[str, Reading]:
    """The reading of every task; none if there are no images.

    Args:
        text_keys: resamplers at task tokens also read the text behind the image.

    Raises:
        ValueError: an image has no task tokens of a task that reads them, or lies on no known places.
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
    """``value`` with every tensor in it changed."""
    if isinstance(value, Tensor):
        return change(value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _changed(getattr(value, field.name), change) for field in fields(value)})
    return value
