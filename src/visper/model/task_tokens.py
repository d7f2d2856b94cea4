"""Task tokens: vocabulary entries after the image, whose embeddings come from trainable query matrices in PT.

Paper, section 3: a task's query matrix (depth and seg: as many rows as the target has tokens) holds the queries of its
predictors; the means of ``per_task`` consecutive groups of its rows are the embeddings of its task tokens.
Shape suffixes: B = samples, L = sequence, D = LLM width, T = all task tokens, Q = rows of a query matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from visper.common.errors import ConfigError


def task_token_names(task: str, per_task: int) -> list[str]:
    """The vocabulary entries of a task, for example ``<|depth_1|>`` ... ``<|depth_8|>``."""
    return [f"<|{task}_{number}|>" for number in range(1, per_task + 1)]


def embed_scale(embedding: nn.Module) -> Tensor | float:
    """The factor by which an input embedding multiplies the rows of its table; 1 except in Gemma.

    Gemma rounds it to the table's precision: sqrt(2560) = 50.6 becomes 50.5 in bfloat16.
    """
    scale: Tensor | float = getattr(embedding, "embed_scale", 1.0)
    return scale.to(weight_of(embedding).dtype).float() if isinstance(scale, Tensor) else scale


def weight_of(layer: nn.Module) -> Tensor:
    """The table of an embedding, or the matrix of an output layer."""
    assert isinstance(layer.weight, Tensor)
    return layer.weight


def replace_rows(embedding: nn.Module, found: Callable[[], tuple[Tensor, Tensor]]) -> RemovableHandle:
    """Makes ``embedding`` return other rows for some tokens; ``found`` gives their ids and rows at each lookup."""

    def replace(module: nn.Module, args: tuple[Any, ...], looked_up_BLD: Tensor) -> Tensor:
        ids, rows = found()
        matches = args[0][..., None] == ids
        own_BLD = rows.to(looked_up_BLD.dtype)[matches.int().argmax(-1)]
        return torch.where(matches.any(-1)[..., None], own_BLD, looked_up_BLD)

    return embedding.register_forward_hook(replace)


def random_rows(embedding: nn.Module, count: int, width: int, groups: int, generator: torch.Generator) -> Tensor:
    """Random rows ``[count, width]`` whose means over ``groups`` groups have the input embedding's standard deviation.

    A mean over g rows reduces the standard deviation by sqrt(g), so that of the rows is larger by this factor. For a
    model on the meta device, the result is a meta tensor.
    """
    weight = weight_of(embedding)
    if weight.is_meta:
        return torch.empty(count, width, device="meta")
    spread = float(weight.detach().float().std() * embed_scale(embedding))
    return torch.randn(count, width, generator=generator) * spread * max(1, count // groups) ** 0.5


class TaskTokens(nn.Module):
    """The query matrices of the tasks, which also provide the input embeddings of the task tokens.

    Args:
        ids: the vocabulary ids of each task's tokens, tasks in the order of the sequence.
        queries: a ``[Q, D]`` matrix per task; Q is a multiple of the task's number of tokens.

    Raises:
        ConfigError: Q is not a multiple of the task's number of tokens.
    """

    token_ids: Tensor

    def __init__(self, ids: Mapping[str, list[int]], queries: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.ids = {task: list(task_ids) for task, task_ids in ids.items()}
        for task, task_ids in self.ids.items():
            rows = queries[task].shape[0]
            if rows % len(task_ids):
                raise ConfigError(
                    f"task '{task}' has {rows} queries for {len(task_ids)} task tokens: set 'head.num_queries' to a "
                    f"multiple of {len(task_ids)}"
                )
        # float32 whatever the student's precision: their updates are small.
        self.queries = nn.ParameterDict({task: nn.Parameter(queries[task].detach().float()) for task in self.ids})
        flat = torch.tensor([token for task_ids in self.ids.values() for token in task_ids])
        self.register_buffer("token_ids", flat, persistent=False)

    @property
    def order(self) -> tuple[str, ...]:
        """The tasks, in the order of their tokens in the sequence."""
        return tuple(self.ids)

    def input_rows(self) -> Tensor:
        """The task tokens' input embeddings ``[T, D]``: the means of consecutive groups of each query matrix."""
        rows = [self.queries[task].unflatten(0, (len(task_ids), -1)).mean(dim=1) for task, task_ids in self.ids.items()]
        return torch.cat(rows)

    def attach(self, embedding: nn.Module) -> RemovableHandle:
        """Replaces the looked-up rows of task tokens, with a forward hook on the input embedding."""
        return replace_rows(embedding, lambda: (self.token_ids, self.input_rows()))

    @torch.no_grad()
    def write_back(self, embedding: nn.Module) -> None:
        """Writes the rows into the embedding table, so that the student no longer needs the hook."""
        weight = weight_of(embedding)
        weight[self.token_ids.to(weight.device)] = (self.input_rows() / embed_scale(embedding)).to(weight)

    @classmethod
    def of_vocabulary(cls, ids: Mapping[str, list[int]], embedding: nn.Module, rows: Mapping[str, int]) -> TaskTokens:
        """Trainable task tokens of a trained student; repeats each token's embedding to ``rows`` queries per task."""
        start = cls.frozen(ids, embedding)
        repeats = {task: max(1, rows.get(task, 0) // len(task_ids)) for task, task_ids in ids.items()}
        return cls(ids, {task: start.queries[task].repeat_interleave(n, 0) for task, n in repeats.items()})

    @classmethod
    def frozen(cls, ids: Mapping[str, list[int]], embedding: nn.Module) -> TaskTokens:
        """Frozen task tokens of a trained student: their rows get no gradient in later stages."""
        weight, scale = weight_of(embedding), embed_scale(embedding)
        tokens = cls(ids, {task: weight[torch.tensor(task_ids)].float() * scale for task, task_ids in ids.items()})
        return tokens.requires_grad_(False)
