"""Attention that keeps the samples of a packed row apart.

Three ways, by the attention that the LLM has:

- ``sdpa`` becomes ``SAMPLE_SDPA``: the causal kernel over each sample alone. No mask is built, no pair of tokens of two
  samples is worked through, and it runs wherever torch does.
- ``flash_attention_2`` and ``3``: transformers reads the borders from the position ids and calls the kernel of
  variable lengths.
- ``flex_attention`` and ``eager``: transformers builds a mask from the position ids, in blocks or dense.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from visper.common.errors import ConfigError
from visper.config import Run

SAMPLE_SDPA = "visper_sample_sdpa"
BORDERED = frozenset(("full_attention", "sliding_attention"))
"""Kinds of layers that keep samples of one row apart in all of these ways."""


def sample_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sample_lengths: list[int] | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention ``[1, T, heads, width]`` of each sample to itself; without ``sample_lengths`` stock SDPA.

    Args:
        query, key, value: ``[1, heads, T, width]``.
        sample_lengths: tokens of each sample, T in sum.
        sliding_window: positions that a token of this layer sees, itself included.
    """
    if sample_lengths is None:
        whole: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return whole
    parts = zip(*(values.split(sample_lengths, dim=2) for values in (query, key, value)), strict=True)
    attended = [sdpa_attention_forward(module, *part, _window(part[0], sliding_window), **kwargs)[0] for part in parts]
    return torch.cat(attended, dim=1), None


def _window(query: Tensor, size: int | None) -> Tensor | None:
    """The mask of a sample longer than its layer's window; others need none, which is faster."""
    tokens = query.shape[2]
    if size is None or tokens <= size:
        return None
    seen = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device)
    return seen.tril().triu(1 - size)[None, None]


AttentionInterface.register(SAMPLE_SDPA, sample_sdpa)
AttentionMaskInterface.register(SAMPLE_SDPA, sdpa_mask)


def choose_attention(run: Run, llm: Any) -> None:
    """Gives the LLM the attention that the run names, if any, in the form that packing needs.

    Raises:
        ConfigError: it cannot be had here, or the LLM carries something from one sample of a row into the next.
    """
    wanted = run.optimization.attention
    if wanted is not None:
        try:
            llm.set_attn_implementation(wanted)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"optimization.attention '{wanted}' cannot be had: {error}") from error
    if run.optimization.packing:
        keep_samples_apart(llm)


def keep_samples_apart(llm: Any) -> None:
    """Makes ``llm`` ready for packed rows.

    Raises:
        ConfigError: it has layers that do not keep to the borders of samples.
    """
    strange = sorted(set(getattr(llm.config, "layer_types", None) or ()) - BORDERED)
    if strange:
        raise ConfigError(
            f"optimization.packing: {type(llm).__name__} has layers of kind {strange}, which do not keep samples of "
            "one row apart: remove 'packing' and use data.group_by_length"
        )
    if llm.config._attn_implementation == "sdpa":
        llm.set_attn_implementation(SAMPLE_SDPA)


def borders(llm: Any, position_ids: Tensor | None, sample_lengths: list[int] | None) -> dict[str, Any]:
    """What the LLM's forward is told of a packed row; nothing of rows of one sample."""
    if position_ids is None:
        return {}
    if llm.config._attn_implementation != SAMPLE_SDPA:
        return {"position_ids": position_ids}
    # A mask of four dimensions is taken as it is: none of all pairs is built, and this one is not looked at.
    unread = position_ids.new_zeros(1, 1, 1, 1)
    return {"position_ids": position_ids, "sample_lengths": sample_lengths, "attention_mask": unread}
