"""The rows of an epoch and their order, a function of (seed, epoch) alone; optionally in groups of similar length.

Every process builds the same global order, and accelerate gives each its share of the batches, so neither the number of
workers nor a restart changes which rows form a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.data import Sampler

from visper.common.errors import DataError
from visper.data.image_order import count_images, fill_micro_batches, mean_lengths, side_by_side

POOL_BATCHES = 50  # rows are sorted by length within pools of this many batches, to keep the order random
T = TypeVar("T")


def spread(rows: Sequence[T], limit: int | None) -> list[T]:
    """At most ``limit`` rows, evenly spaced over all, so that every part of the data is represented."""
    if limit is None or limit >= len(rows):
        return list(rows)
    return [rows[i * len(rows) // limit] for i in range(limit)]


@dataclass(frozen=True)
class Mixture:
    """How often the rows of each source occur in an epoch.

    With weight 2.25, every row occurs twice, and a quarter of the rows, another one in each epoch, a third time: four
    epochs have each row nine times.

    Args:
        sources: the source of each row, ``[rows]``.
        weights: the weight of each source, above 0.

    Raises:
        DataError: a weight is so small that an epoch would have no row of its source.
    """

    sources: Tensor
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        for source, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True)):
            if size and not count:
                raise DataError(
                    "weight too small",
                    f"{self.weights[source]} of the {size} rows of source {source + 1} is less than half a row: give "
                    f"at least {1 / size:.3g}, or leave the source out",
                )

    @property
    def sizes(self) -> list[int]:
        """Rows of each source."""
        return [int(size) for size in torch.bincount(self.sources, minlength=len(self.weights))]

    @property
    def counts(self) -> list[int]:
        """Rows of each source in an epoch, counting repetitions."""
        return [round(weight * size) for weight, size in zip(self.weights, self.sizes, strict=True)]

    def rows(self, seed: int, epoch: int) -> Tensor:
        """The rows of an epoch with repetitions, source by source."""
        chosen = []
        for source, count in enumerate(self.counts):
            own = torch.nonzero(self.sources == source).flatten()
            generator = torch.Generator().manual_seed(seed * 1_000_003 - 1 - source)
            # Cycle through a fixed shuffle: each epoch continues where the previous one ended.
            places = torch.arange(epoch * count, (epoch + 1) * count) % max(1, len(own))
            chosen.append(own[torch.randperm(len(own), generator=generator)][places])
        return torch.cat(chosen)


class RowSampler(Sampler[int]):
    """Shuffled row indices, another order in every epoch.

    Args:
        lengths: tokens of each row, to put rows of similar length side by side; None: a plain shuffle.
        has_image: which rows have an image; with ``lengths``, each group has one modality.
        global_batch: size of the groups. An epoch is filled up to a multiple of it with rows from its start, so that
            its last step, too, is the same however the batch is split, and no process runs out of rows.
        mixture: how often rows occur in an epoch; None: once.
        groups: a group number for each row; rows of one group are put side by side (``data.image_order``).
        micro_batch: rows of one group are kept in one micro-batch if they fit; this moves rows only within a global
            batch.
    """

    def __init__(
        self,
        num_rows: int,
        seed: int = 0,
        lengths: Sequence[int] | None = None,
        has_image: Sequence[bool] | None = None,
        global_batch: int = 1,
        mixture: Mixture | None = None,
        groups: Sequence[int] | None = None,
        micro_batch: int = 1,
    ) -> None:
        for name, values in (("lengths", lengths), ("has_image", has_image), ("groups", groups)):
            if values is not None and len(values) != num_rows:
                raise ValueError(f"{name} has {len(values)} entries for {num_rows} rows: give one per row")
        self.num_rows = num_rows
        self.mixture = mixture
        self.epoch_rows = num_rows if mixture is None else sum(mixture.counts)
        self.seed = seed
        self.epoch = 0
        self.global_batch = global_batch
        self.lengths = None if lengths is None else torch.tensor(list(lengths))
        self.has_image = torch.zeros(num_rows, dtype=torch.bool) if has_image is None else torch.tensor(list(has_image))
        self.groups = None if groups is None else torch.tensor(list(groups))
        self.micro_batch = micro_batch
        if self.groups is not None and self.lengths is not None:
            self.lengths = mean_lengths(self.lengths, self.groups)

    def set_epoch(self, epoch: int) -> None:
        """Selects the epoch whose order ``__iter__`` gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.epoch_rows // self.global_batch) * self.global_batch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.epoch_rows, generator=generator)
        if self.mixture is not None:
            order = self.mixture.rows(self.seed, self.epoch)[order]
        if self.groups is not None:
            order = side_by_side(order, self.groups)
        if self.lengths is not None:
            order = self._grouped(order, self.lengths, generator)
        rows = order.repeat(-(-len(self) // max(1, self.epoch_rows)))[: len(self)].tolist()
        if self.groups is not None:
            steps = (rows[at : at + self.global_batch] for at in range(0, len(rows), self.global_batch))
            groups = self.groups.tolist()
            rows = [row for step in steps for row in fill_micro_batches(step, groups, self.micro_batch)]
        return iter(rows)

    def images_read(self, has_image: Sequence[bool]) -> tuple[int, Tensor]:
        """The number of rows with an image in this epoch, and the number of images in each micro-batch."""
        rows = list(self)
        shown = torch.tensor(has_image)[rows]
        numbers = torch.arange(self.num_rows) if self.groups is None else self.groups
        return int(shown.sum()), count_images(numbers[rows], shown, self.micro_batch)

    def _grouped(self, order: Tensor, lengths: Tensor, generator: torch.Generator) -> Tensor:
        """``order`` in shuffled groups of a global batch, each of one modality and similar length.

        Rows left over from complete groups come last.
        """
        size = self.global_batch
        groups: list[Tensor] = []
        rest: list[Tensor] = []
        for modality in (True, False):
            rows = order[self.has_image[order] == modality]
            filled = len(rows) // size * size
            rest.append(rows[filled:])
            for pool in rows[:filled].split(size * POOL_BATCHES):
                by_length = pool[torch.argsort(lengths[pool], descending=True, stable=True)]
                groups.extend(by_length.split(size))
        shuffled = [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]
        return torch.cat([*shuffled, *rest])
