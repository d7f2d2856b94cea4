"""Perceiver resampler: turns any number of hidden states into a fixed number of embeddings (paper, section 3).

Shape suffixes: B = samples, K = keys (hidden states), Q = queries, D = LLM width, C = inner width, E = embedding width.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, pad, scaled_dot_product_attention


class ResamplerAttention(nn.Module):
    """Queries attend to [keys ; queries]; keys and queries have separate LayerNorms."""

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_keys = nn.LayerNorm(width)
        self.norm_queries = nn.LayerNorm(width)
        self.to_query = nn.Linear(width, heads * head_width, bias=False)
        self.to_key_value = nn.Linear(width, 2 * heads * head_width, bias=False)
        self.to_out = nn.Linear(heads * head_width, width, bias=False)

    def forward(self, keys_BKC: Tensor, queries_BQC: Tensor, key_mask_BK: Tensor | None = None) -> Tensor:
        """Returns ``[B, Q, C]``. Queries shared by all samples may be ``[1, Q, C]``, which are projected once."""
        batch = len(keys_BKC)
        queries = self.norm_queries(queries_BQC)
        both = torch.cat(
            (self.to_key_value(self.norm_keys(keys_BKC)), self.to_key_value(queries).expand(batch, -1, -1)), dim=1
        )
        key, value = self._split(both).chunk(2, dim=1)
        query = self._split(self.to_query(queries)).expand(batch, -1, -1, -1)
        mask = None
        if key_mask_BK is not None:
            mask = pad(key_mask_BK, (0, queries.shape[1]), value=True)[:, None, None, :]
        # SDPA computes the published form: query and key both scaled by head_width^-1/4, and a float32 softmax.
        attended = scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.to_out(attended.transpose(1, 2).flatten(2))

    def _split(self, values: Tensor) -> Tensor:
        parts = values.shape[-1] // self.to_query.out_features * self.heads
        return values.unflatten(-1, (parts, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    """LayerNorm, linear, exact GELU, linear; the linear layers have no bias."""

    def __init__(self, width: int, multiple: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, multiple * width, bias=False)
        self.narrow = nn.Linear(multiple * width, width, bias=False)

    def forward(self, values: Tensor) -> Tensor:
        return self.narrow(gelu(self.widen(self.norm(values))))


class ResamplerLayer(nn.Module):
    """Attention and feed-forward, each added to its input."""

    def __init__(self, width: int, heads: int, head_width: int, ff_mult: int) -> None:
        super().__init__()
        self.attention = ResamplerAttention(width, heads, head_width)
        self.feed_forward = FeedForward(width, ff_mult)

    def forward(self, keys_BKC: Tensor, queries_BQC: Tensor, key_mask_BK: Tensor | None = None) -> Tensor:
        """``[B, Q, C]``."""
        queries_BQC = queries_BQC + self.attention(keys_BKC, queries_BQC, key_mask_BK)
        return queries_BQC + self.feed_forward(queries_BQC)


class PerceiverResampler(nn.Module):
    """Turns any number of hidden states into a fixed number of embeddings.

    Args:
        width_in: width of hidden states and queries (D).
        width: inner width (C).
        width_out: width of the embeddings (E).
        depth, heads, head_width, ff_mult: see ``config.Head``.
        num_latents: number of queries of the inner width that the resampler owns, for use without task tokens (probes).
    """

    def __init__(
        self,
        width_in: int,
        width: int,
        width_out: int,
        depth: int = 1,
        heads: int = 4,
        head_width: int = 32,
        ff_mult: int = 1,
        num_latents: int | None = None,
    ) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, num_latents, width) / width**0.5) if num_latents else None
        self.project_in = nn.Linear(width_in, width)
        self.project_out = nn.Linear(width, width_out)
        # LayerNorm of a single channel returns its bias, whatever was predicted.
        self.norm_out = nn.LayerNorm(width_out) if width_out > 1 else nn.Identity()
        self.layers = nn.ModuleList(ResamplerLayer(width, heads, head_width, ff_mult) for _ in range(depth))

    def forward(
        self, states_BKD: Tensor, queries_BQD: Tensor | None = None, key_mask_BK: Tensor | None = None
    ) -> Tensor:
        """Embeddings ``[B, Q, E]``.

        Args:
            states_BKD: hidden states.
            queries_BQD: queries, or ``[1, Q, D]`` for all samples; None: the resampler's own latents.
            key_mask_BK: True where a state may be read; None: everywhere.
        """
        if queries_BQD is None and self.latents is None:
            raise ValueError("this resampler owns no latents: give queries, or build it with num_latents")
        queries = self.latents if queries_BQD is None else self.project_in(queries_BQD)
        keys = self.project_in(states_BKD)
        for layer in self.layers:
            queries = layer(keys, queries, key_mask_BK)
        return self.norm_out(self.project_out(queries))
