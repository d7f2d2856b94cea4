"""Positions of image, task tokens and text in each row, read from the ids.

The published code uses constants (38, 26 or 13 system tokens, 576 image tokens), so another prompt or resolution reads
the wrong states. Here positions come from the ids: image spans may differ from row to row.

Shape suffixes: B = rows, L = sequence, R = chosen rows, K = keys.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class KeyPlaces:
    """The positions a predictor reads: ``index`` ``[R, K]`` into the sequence, ``mask`` ``[R, K]`` True where real.

    ``mask`` is None where every row has K positions, so that attention needs none.
    """

    index: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class TokenLayout:
    """Boolean maps of a batch.

    Attributes:
        image: ``[B, L]``, True at image tokens.
        tasks: per task ``[B, L]``, True at the task's own tokens.
        attended: ``[B, L]``, False at padding.
    """

    image: Tensor
    tasks: Mapping[str, Tensor]
    attended: Tensor

    @classmethod
    def from_ids(
        cls,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        image_token_id: int,
        task_token_ids: Mapping[str, Iterable[int]],
    ) -> "TokenLayout":
        """Reads the maps from ``[B, L]`` ids; ``attention_mask`` None means no padding."""
        attended = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        tasks = {
            task: torch.isin(input_ids, torch.tensor(list(ids), device=input_ids.device)) & attended
            for task, ids in task_token_ids.items()
        }
        return cls((input_ids == image_token_id) & attended, tasks, attended)

    def keys(self, task: str, rows: Tensor, text: bool = True) -> KeyPlaces:
        """The positions that the predictors of ``task`` read in ``rows`` ``[R]``.

        Everything up to the image's end, the task's own tokens and the text; not the other tasks' tokens, not padding.
        ``text=False`` leaves out what follows the image and task tokens.
        """
        readable = self.attended[rows]
        for other, places in self.tasks.items():
            if other != task:
                readable = readable & ~places[rows]
        if not text:
            readable = readable & ~self._behind_image(rows)
        counts = readable.sum(1)
        longest, shortest = (int(n) for n in torch.stack((counts.max(), counts.min())).tolist())
        # A stable sort moves the readable positions to the front in their order.
        index = readable.int().argsort(dim=1, descending=True, stable=True)[:, :longest]
        mask = torch.arange(longest, device=index.device) < counts[:, None]
        return KeyPlaces(index, None if shortest == longest else mask)

    def own_tokens(self, task: str, rows: Tensor) -> Tensor:
        """``[R, L]``, True at the task's own tokens; in a model without task tokens, True at the image's.

        Raises:
            ValueError: the model has task tokens but none of this task, or a row has none of them.
        """
        if not self.tasks:
            return self.image[rows]
        if task not in self.tasks:
            raise ValueError(f"task '{task}' has no task tokens, only {list(self.tasks)}: add it to the task tokens")
        own = self.tasks[task][rows]
        empty = (~own.any(1)).nonzero().flatten().tolist()
        if empty:
            raise ValueError(
                f"rows {[int(rows[i]) for i in empty]} have an image but none of the task tokens of '{task}': build "
                "the inputs with the student's processor, and never truncate the block of image and task tokens"
            )
        return own

    def _behind_image(self, rows: Tensor) -> Tensor:
        block = self.image[rows]
        for places in self.tasks.values():
            block = block | places[rows]
        # Not yet ended = some token of the block lies here or further right.
        return block.int().flip(1).cumsum(1).flip(1) == 0
