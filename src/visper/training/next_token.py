"""The next-token loss: logits at supervised positions only, a few at a time.

With a vocabulary of 128k, the logits of a batch of long answers would otherwise fill a GPU.

Shape suffixes: T = supervised tokens, D = width of the LLM, V = words of the vocabulary.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from visper.common.compat import is_partitioned

LOGIT_ROWS = 2048
"""Positions whose logits are in memory at once: 1 GB in float32 for a vocabulary of 128k."""


def next_token_loss(
    states_TD: Tensor,
    wanted_T: Tensor,
    head: nn.Module,
    silent_ids: Tensor,
    cap: float | None = None,
    fuse: bool = True,
    each: bool = False,
) -> Tensor:
    """Cross-entropy summed over supervised tokens; with ``each``, per token, ``[T]``.

    Args:
        states_TD: last hidden states of the positions before the supervised tokens.
        wanted_T: ids of the supervised tokens.
        head: the output layer.
        silent_ids: ids that are inputs only, never answers. They are excluded from the softmax, so that their rows of a
            tied head get no gradient from it.
        cap: bound of the logits, ``cap * tanh(logits / cap)``; None for models without.
        fuse: whether ``head`` is only its weight (no hook, no sharding), so that torch's fused loss may replace it.
    """
    reduction = "none" if each else "sum"
    if len(states_TD) <= LOGIT_ROWS:
        return _cross_entropy(states_TD, wanted_T, head, silent_ids, cap, reduction)
    if fuse and cap is None and can_fuse(head, states_TD):
        weight_VD = head.weight
        bias_V = weight_VD.new_zeros(len(weight_VD)).index_fill_(0, silent_ids, float("-inf"))
        chunks = nn.LinearCrossEntropyOptions()
        fused: Tensor = F.linear_cross_entropy(
            states_TD, weight_VD, wanted_T, linear_bias=bias_V, reduction=reduction, options=chunks
        )
        return fused
    parts = zip(states_TD.split(LOGIT_ROWS), wanted_T.split(LOGIT_ROWS), strict=True)
    found = [checkpoint(_cross_entropy, *part, head, silent_ids, cap, reduction, use_reentrant=False) for part in parts]
    return torch.cat(found) if each else torch.stack(found).sum()


def can_fuse(head: nn.Module, states_TD: Tensor) -> TypeGuard[nn.Linear]:
    """Whether ``F.linear_cross_entropy`` (torch 2.15) may replace head and loss: in plain float32 only.

    In bfloat16 it sums the loss in bfloat16 (off by 1e-3), and it ignores autocast (docs/speed.md).
    """
    return (
        hasattr(F, "linear_cross_entropy")
        and type(head) is nn.Linear
        and head.bias is None
        and states_TD.dtype == head.weight.dtype == torch.float32
        and not torch.is_autocast_enabled(states_TD.device.type)
        and not is_partitioned(head.weight)
    )


def _cross_entropy(
    states_TD: Tensor, wanted_T: Tensor, head: nn.Module, silent_ids: Tensor, cap: float | None, reduction: str
) -> Tensor:
    logits_TV: Tensor = head(states_TD).float()
    if cap is not None:
        logits_TV = cap * torch.tanh(logits_TV / cap)
    return F.cross_entropy(logits_TV.index_fill_(1, silent_ids, float("-inf")), wanted_T, reduction=reduction)
