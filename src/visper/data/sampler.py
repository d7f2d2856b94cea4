"""The order of the rows: a function of (seed, epoch) alone, in groups of similar length if asked.

Every rank builds the same global order and takes its share of the batches (accelerate does), so that neither the
number of workers nor a restart changes which rows meet in a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

POOL_BATCHES = 50  # rows are sorted by length within pools of so many batches: similar lengths, still random


class RowSampler(Sampler[int]):
    """Shuffled row indices, new in every epoch.

    Args:
        num_rows: rows of the dataset.
        seed: of the run.
        lengths: tokens of each row, to put rows of similar length side by side; None: a plain shuffle.
        has_image: which rows show an image; with ``lengths``, groups hold one modality.
        group_size: rows that are to be alike: the global batch.
    """

    def __init__(
        self,
        num_rows: int,
        seed: int = 0,
        lengths: Sequence[int] | None = None,
        has_image: Sequence[bool] | None = None,
        group_size: int = 1,
    ) -> None:
        for name, values in (("lengths", lengths), ("has_image", has_image)):
            if values is not None and len(values) != num_rows:
                raise ValueError(f"{name} has {len(values)} entries for {num_rows} rows: give one a row")
        self.num_rows = num_rows
        self.seed = seed
        self.epoch = 0
        self.group_size = group_size
        self.lengths = None if lengths is None else torch.tensor(list(lengths))
        self.has_image = torch.zeros(num_rows, dtype=torch.bool) if has_image is None else torch.tensor(list(has_image))

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of epoch ``epoch``."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_rows

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.num_rows, generator=generator)
        if self.lengths is not None:
            order = self._grouped(order, self.lengths, generator)
        return iter(order.tolist())

    def _grouped(self, order: torch.Tensor, lengths: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        groups: list[torch.Tensor] = []
        rest: list[torch.Tensor] = []
        for modality in (True, False):
            rows = order[self.has_image[order] == modality]
            whole = len(rows) // self.group_size * self.group_size
            rest.append(rows[whole:])
            for pool in rows[:whole].split(self.group_size * POOL_BATCHES):
                by_length = pool[torch.argsort(lengths[pool], descending=True, stable=True)]
                groups.extend(by_length.split(self.group_size))
        shuffled = [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]
        # What fills no group comes last, so that the groups before it stay whole.
        return torch.cat([*shuffled, *rest])
