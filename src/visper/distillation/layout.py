"""Positions of images, task tokens and text in each row, read from the token ids.

The published code uses constants (38, 26 or 13 system tokens, 576 image tokens), so with another prompt or resolution
it reads the wrong states. Here a row may have any number of images, each of any number of tokens, and several samples
(packing).

Shape suffixes: B = rows, L = sequence, S = images, T = image tokens of all images, K = positions of one image.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Positions:
    """Positions selected for each image: its row, ``rows`` ``[S]``, and ``index`` ``[S, K]`` in the row's sequence.

    ``mask`` ``[S, K]`` is False at padding, or None if every image has K positions, so that attention needs no mask.
    With a mask, ``real`` has the indices of its True entries in the flattened ``[S * K]``.
    """

    rows: Tensor
    index: Tensor
    mask: Tensor | None
    real: Tensor | None = None

    def gather(self, states_BLD: Tensor) -> Tensor:
        """``[S, K, D]``: the states at these positions."""
        flat = (self.rows[:, None] * states_BLD.shape[1] + self.index).flatten()
        return states_BLD.flatten(0, 1).index_select(0, flat).unflatten(0, self.index.shape)

    @classmethod
    def of(cls, rows: Tensor, chosen_SL: Tensor) -> Positions:
        """The True positions of ``[S, L]``, in order."""
        counts = chosen_SL.sum(1)
        longest, shortest = (int(n) for n in torch.stack((counts.max(), counts.min())).tolist())
        # A stable sort moves the chosen positions to the front and keeps their order.
        index = chosen_SL.int().argsort(dim=1, descending=True, stable=True)[:, :longest]
        mask = torch.arange(longest, device=index.device) < counts[:, None]
        if shortest == longest:
            return cls(rows, index, None)
        return cls(rows, index, mask, mask.flatten().nonzero().squeeze(1))


@dataclass(frozen=True)
class TokenLayout:
    """Positions of images, task tokens and padding in a batch. Images are numbered in order of their tokens, by row.

    Attributes:
        image: ``[B, L]``, True at image tokens.
        tasks: task -> ``[B, L]``, True at the task's tokens.
        attended: ``[B, L]``, False at padding.
        rows: ``[S]`` row of each image.
        owner: ``[B, L]`` the last image that begins at or before a position; -1 before a row's first image.
        samples: ``[B, L]`` number of the sample within a packed row; None: a row is one sample.
        places: ``[T, 2]`` for each image token the point (x, y) in 0..1 of the image that it shows, NaN for a token
            that shows none of it (padding, separators); None: each image's tokens are a square grid, row by row.
    """

    image: Tensor
    tasks: Mapping[str, Tensor]
    attended: Tensor
    rows: Tensor
    owner: Tensor
    samples: Tensor | None = None
    places: Tensor | None = None

    @classmethod
    def from_ids(
        cls,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        image_token_id: int,
        task_token_ids: Mapping[str, Iterable[int]],
        image_rows: Tensor | None = None,
        image_tokens: Tensor | None = None,
        samples: Tensor | None = None,
        places: Tensor | None = None,
    ) -> TokenLayout:
        """Reads the layout from ``[B, L]`` ids.

        Args:
            attention_mask: ``[B, L]``; None means no padding.
            image_rows: ``[S]`` ascending, the row of each image; a row with n images appears n times. Default: every
                row with image tokens has one image.
            image_tokens: ``[S]`` number of tokens of each image. Default: the only image of a row has all image tokens
                of the row; several images have one contiguous run each.
            samples, places: see the attributes.

        Raises:
            ValueError: the counts do not match the ids.
        """
        attended = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        tasks = {
            task: torch.isin(input_ids, torch.tensor(list(ids), device=input_ids.device)) & attended
            for task, ids in task_token_ids.items()
        }
        image = (input_ids == image_token_id) & attended
        rows = image.any(1).nonzero().flatten() if image_rows is None else image_rows
        chosen = image & torch.zeros_like(image[:, 0]).index_fill_(0, rows, True)[:, None]
        if image_tokens is None:
            image_tokens = _count_tokens(chosen, rows)
        numbers = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), image_tokens)
        found = chosen.nonzero()
        if len(numbers) != len(found) or not torch.equal(rows[numbers], found[:, 0]):
            raise ValueError(
                f"image_tokens of the images in rows {rows.tolist()} are {image_tokens.tolist()}, but these rows have "
                f"{chosen.sum(1)[rows].tolist()} image tokens (id {image_token_id}): list images in row order, take "
                "ids and counts from the same processor, and never truncate an image's tokens"
            )
        if places is not None and places.shape != (len(found), 2):
            raise ValueError(
                f"places are {tuple(places.shape)}, expected {(len(found), 2)}: give (x, y) of each image token"
            )
        owner = torch.full_like(input_ids, -1)
        owner[chosen] = numbers
        return cls(image, tasks, attended, rows, owner.cummax(1).values, samples, places)

    def keys(self, task: str, text: bool = True) -> Positions:
        """The positions that a resampler of ``task`` reads for each image.

        These are the image's tokens, its tokens of this task and the text of its sample, without the tokens of other
        images and other tasks. ``text=False`` leaves out everything after the image and its task tokens.
        """
        own = self._own()
        readable = self.attended[self.rows] & (~self.image[self.rows] | own)
        if self.samples is not None:
            readable = readable & self._same_sample(own)
        for other, places in self.tasks.items():
            readable = readable & (~places[self.rows] | own) if other == task else readable & ~places[self.rows]
        if not text:
            readable = readable & ~self._after(own)
        return Positions.of(self.rows, readable)

    def image_positions(self) -> Positions:
        """The positions of each image's own tokens."""
        return Positions.of(self.rows, self.own_image_tokens())

    def sequence(self) -> Positions:
        """All positions of each image's sample, without padding."""
        readable = self.attended[self.rows]
        return Positions.of(self.rows, readable if self.samples is None else readable & self._same_sample(self._own()))

    def own_image_tokens(self) -> Tensor:
        """``[S, L]``, True at each image's own tokens."""
        return self.image[self.rows] & self._own()

    def own_tokens(self, task: str) -> Tensor:
        """``[S, L]``, True at each image's tokens of ``task``; in a model without task tokens, at its image tokens.

        Raises:
            ValueError: the model has task tokens but none of this task, or an image has none of them.
        """
        if not self.tasks:
            return self.own_image_tokens()
        if task not in self.tasks:
            raise ValueError(f"task '{task}' has no task tokens, only {list(self.tasks)} have: add tokens for it")
        own = self.tasks[task][self.rows] & self._own()
        empty = (~own.any(1)).nonzero().flatten().tolist()
        if empty:
            raise ValueError(
                f"rows {[int(self.rows[i]) for i in empty]} have an image but none of the task tokens of '{task}': "
                "build the inputs with the student's processor, and never truncate the block of image and task tokens"
            )
        return own

    def _own(self) -> Tensor:
        """``[S, L]``, True from an image's first token to the next image's, or to the end of the row."""
        return self.owner[self.rows] == torch.arange(len(self.rows), device=self.rows.device)[:, None]

    def _same_sample(self, own_SL: Tensor) -> Tensor:
        assert self.samples is not None
        samples_SL = self.samples[self.rows]
        first_S1 = own_SL.int().argmax(1, keepdim=True)
        return samples_SL == samples_SL.gather(1, first_S1)

    def _after(self, own_SL: Tensor) -> Tensor:
        block = self.image[self.rows]
        for places in self.tasks.values():
            block = block | places[self.rows]
        # A position is not after the block if some token of the block is at it or to its right.
        return (block & own_SL).int().flip(1).cumsum(1).flip(1) == 0


def _count_tokens(chosen_BL: Tensor, rows_S: Tensor) -> Tensor:
    """``[S]`` tokens per image: all image tokens of a row with one image, one contiguous run per image otherwise."""
    per_row = chosen_BL.sum(1)
    if len(rows_S.unique()) == len(rows_S):
        return per_row[rows_S]
    begins = chosen_BL & ~torch.cat((torch.zeros_like(chosen_BL[:, :1]), chosen_BL[:, :-1]), 1)
    counts = []
    for row in rows_S.unique().tolist():
        images = int((rows_S == row).sum())
        numbers = begins[row].cumsum(0)[chosen_BL[row]]
        runs = numbers.bincount()[1:]
        if images == 1:
            runs = per_row[row][None]
        elif len(runs) != images:
            raise ValueError(
                f"row {row} has {images} images but {len(runs)} contiguous runs of image tokens: give 'image_tokens', "
                "the number of tokens of each image"
            )
        counts.append(runs)
    return torch.cat(counts)
