"""Targets of a micro-batch, and the pool of the global batch's targets for InfoNCE.

Shape suffixes: B = own samples, P = samples in the pool, N = teacher tokens, E = teacher width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Targets:
    """One task's targets.

    Attributes:
        own: ``[B, N, E]`` targets of the samples with an image, in the order of their rows.
        pool: ``[P, N, E]`` targets of the whole global batch.
        labels: ``[B]`` row of each own target in the pool.
        same: ``[B, P]``, True where a pool target is of the same image, in this row or another; None: all images
            differ.
    """

    own: Tensor
    pool: Tensor
    labels: Tensor
    same: Tensor | None = None


@torch.no_grad()
def gather_targets(
    own: Tensor,
    decode: Callable[[Tensor], Tensor] = torch.Tensor.float,
    counts: Sequence[int] | None = None,
) -> Targets:
    """Gathers every rank's targets, in rank order, into one pool on all ranks. No gradient flows through it.

    Ranks may have different numbers of samples, including zero, but every rank must call this. Targets are sent in the
    dtype given and pooled in float32. In one process the pool is ``own``.

    Args:
        own: ``[B, N, E]``, or encoded targets ``[B, ...]``.
        decode: turns the gathered rows into targets ``[P, N, E]`` in float32.
        counts: see ``gather_rows``.
    """
    own = own.detach()
    rows, start = gather_rows(own, counts)
    pool, end = decode(rows), start + len(own)
    return Targets(pool[start:end], pool, torch.arange(start, end, device=own.device))


@torch.no_grad()
def gather_rows(own: Tensor, counts: Sequence[int] | None = None) -> tuple[Tensor, int]:
    """The rows of all ranks, in rank order, and the index of this rank's first row. Every rank must call this.

    Args:
        counts: number of rows of each rank; None: gathered first, for which the host waits.
    """
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if ranks == 1:
        return own, 0
    sizes = _row_counts(own, ranks) if counts is None else list(counts)
    # Collectives need equal shapes: pad to the longest, then cut. If no rank has samples, nothing is sent.
    padded = own.new_zeros(max(sizes), *own.shape[1:])
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in range(ranks)]
    if max(sizes):
        dist.all_gather(parts, padded)
    pool = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
    return pool, sum(sizes[: dist.get_rank()])


def _row_counts(own: Tensor, ranks: int) -> list[int]:
    """The number of rows on each rank."""
    count = torch.tensor([len(own)], device=own.device)
    counts = [torch.zeros_like(count) for _ in range(ranks)]
    dist.all_gather(counts, count)
    return [int(size) for size in torch.cat(counts).tolist()]
