"""Attention that keeps the samples of a packed row apart.

Three ways, by the attention function of the LLM:

- ``sdpa`` becomes ``SAMPLE_SDPA``: the causal kernel on each sample alone. Stock SDPA would build a dense mask of all
  pairs of tokens, which is slower than padding (docs/speed.md); this runs on every device.
- ``flash_attention_2`` and ``3``: transformers calls the kernel for variable lengths with the borders of the samples.
- ``flex_attention`` and ``eager``: transformers builds a mask from the position ids, in blocks or dense.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from visper.common.compat import attention_of
from visper.common.errors import ConfigError
from visper.config import Run

SAMPLE_SDPA = "visper_sample_sdpa"
SEPARABLE_LAYERS = frozenset(("full_attention", "sliding_attention"))
"""Values of a config's ``layer_types`` whose layers keep the samples of a row apart in all of these ways."""


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
        unpacked: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return unpacked
    parts = zip(*(values.split(sample_lengths, dim=2) for values in (query, key, value)), strict=True)
    attended = [sdpa_attention_forward(module, *part, _window(part[0], sliding_window), **kwargs)[0] for part in parts]
    return torch.cat(attended, dim=1), None


def _window(query: Tensor, size: int | None) -> Tensor | None:
    """The mask of a sample that is longer than its layer's window; shorter samples need none, which is faster."""
    tokens = query.shape[2]
    if size is None or tokens <= size:
        return None
    seen = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device)
    return seen.tril().triu(1 - size)[None, None]


AttentionInterface.register(SAMPLE_SDPA, sample_sdpa)
AttentionMaskInterface.register(SAMPLE_SDPA, sdpa_mask)


def choose_attention(run: Run, llm: Any) -> None:
    """Sets the attention that the run names on the LLM, and prepares it for packed rows where the run packs.

    Raises:
        ConfigError: the attention is not available here, or the LLM's layers cannot keep the samples of a row apart.
    """
    name = run.optimization.attention
    if name is not None:
        try:
            llm.set_attn_implementation(name)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"optimization.attention={name} is not available: {error}") from error
    if run.optimization.packing:
        separate_samples(llm)


def separate_samples(llm: Any) -> None:
    """Prepares ``llm`` for packed rows.

    Raises:
        ConfigError: it has layers that carry something from one sample of a row into the next.
    """
    mixing = sorted(set(getattr(llm.config, "layer_types", None) or ()) - SEPARABLE_LAYERS)
    if mixing:
        raise ConfigError(
            f"optimization.packing: {type(llm).__name__} has layers of type {mixing}, which do not keep the samples of "
            "a row apart: set optimization.packing=false and data.group_by_length=true"
        )
    if attention_of(llm) == "sdpa":
        llm.set_attn_implementation(SAMPLE_SDPA)


def packing_arguments(llm: Any, position_ids: Tensor | None, borders: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that tell the LLM's forward where the samples of a packed row begin; none for unpacked rows.

    Args:
        position_ids: ``[1, T]``, from 0 in every sample; None for unpacked rows.
        borders: ``cu_seq_lens_q`` ``[samples + 1]`` and the others that ``data.packing`` makes.
    """
    if position_ids is None:
        return {}
    if attention_of(llm) != SAMPLE_SDPA:
        return {"position_ids": position_ids, **borders}
    # transformers takes a mask of four dimensions as it is: this one keeps it from building one, and is not read.
    unread = position_ids.new_zeros(1, 1, 1, 1)
    lengths = borders["cu_seq_lens_q"].diff().tolist()
    return {"position_ids": position_ids, "sample_lengths": lengths, "attention_mask": unread}
