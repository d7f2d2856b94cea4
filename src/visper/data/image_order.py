"""Orders rows so that those about one image share a micro-batch, where ``data.joining`` joins them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from visper.data.rows.table import Records


def image_groups(records: Records) -> npt.NDArray[np.int64]:
    """A group number for each row, ``[rows]``: equal for rows of one source with the same images, else unique."""
    names = [(own, i) for i, part in enumerate(records.parts) for own in part.table.image_names()]
    numbers: dict[object, int] = {}
    keys = (names[row] if names[row][0] else at for at, row in enumerate(records.rows.tolist()))
    return np.asarray([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def side_by_side(order: Tensor, groups: Tensor) -> Tensor:
    """``order`` with the rows of each group side by side, at the place of the group's lowest row.

    The second occurrences of rows (in mixtures) form a group of their own, so a group has each conversation once.
    """
    rows = order.numpy()
    by_row = np.argsort(rows, kind="stable")
    starts = np.flatnonzero(np.diff(rows[by_row], prepend=-1))
    times = np.diff(starts, append=len(rows))
    seen_before = np.arange(len(rows)) - np.repeat(starts, times)
    keys = groups.numpy()[rows[by_row]] * (times.max(initial=0) + 1) + seen_before
    _, first, group = np.unique(keys, return_index=True, return_inverse=True)
    place = np.empty_like(by_row)
    place[by_row] = by_row[first][group]
    return order[torch.from_numpy(np.argsort(place, kind="stable"))]


def fill_micro_batches(step: Sequence[int], groups: Sequence[int], micro_batch: int) -> list[int]:
    """The rows of one global batch, reordered so that few groups are split between micro-batches.

    The largest groups are placed first, each in the emptiest micro-batch, until all micro-batches are full.
    """
    runs: list[list[int]] = []
    for row in step:
        if runs and groups[runs[-1][-1]] == groups[row] and row not in runs[-1]:
            runs[-1].append(row)
        else:
            runs.append([row])
    batches: list[list[int]] = [[] for _ in range(len(step) // micro_batch)]
    for run in sorted(runs, key=len, reverse=True):
        while run:
            emptiest = min(batches, key=len)
            room = micro_batch - len(emptiest)
            emptiest += run[:room]
            run = run[room:]
    return [row for batch in batches for row in batch]


def mean_lengths(lengths: Tensor, groups: Tensor) -> Tensor:
    """The mean length of each row's group, ``[rows]``; sorting by it keeps the rows of a group side by side."""
    sums = torch.bincount(groups, weights=lengths.double())
    return (sums / torch.bincount(groups).clamp(min=1))[groups]


def count_images(groups: Tensor, shown: Tensor, micro_batch: int) -> Tensor:
    """The number of different images in each micro-batch, ``[rows / micro_batch]``.

    Args:
        groups: group number of each row, ``[rows]``; ``rows`` is a multiple of ``micro_batch``.
        shown: whether each row has an image, ``[rows]``.
    """
    seen = torch.where(shown, groups, -1).view(-1, micro_batch).sort(1).values
    return (seen.diff(dim=1, prepend=seen.new_full((len(seen), 1), -1)) != 0).sum(1)
