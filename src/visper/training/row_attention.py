"""Attention within the samples of a row: what a token may attend to, for each way in which transformers attends.

transformers' models build their attention mask by ``masking_utils``, which calls the function that is registered for
the attention implementation. While the LLM's forward runs on a row of this package (``current_row``), the functions
registered here (``separate_by_mask``) separate the samples of a packed row, whether or not the model tells
``masking_utils`` where they begin. Some do not (GPT-OSS, AFMoE, XGLM), and would let samples attend to each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import and_masks, sdpa_mask

from visper.common.compat import flex_block_mask
from visper.common.errors import ConfigError

SAMPLE_SDPA = "visper_sample_sdpa"
FLASH_KEYS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""transformers' arguments for the sample boundaries of a packed row (``FlashAttentionKwargs``)."""
UNPACKED = "optimization.packing=false, data.join_conversations=false and data.group_by_length=true"
"""What to set for an LLM that cannot separate the samples of a row."""


@dataclass(frozen=True)
class RowSample:
    """A sample of a packed row: ``length`` tokens; all later tokens attend to the first ``prefix`` of them.

    Attributes:
        distance: ``[length - prefix, length]``: position of the query token minus that of the key token; -1 where the
            query must not attend to the key. None if the sample has no branches.
    """

    length: int
    prefix: int
    distance: Tensor | None = None


@dataclass(frozen=True)
class Joined:
    """The attention pattern of a packed row with joined samples.

    A token attends to the prefix of its sample and to its own branch, up to its own position.

    Args:
        samples: ``[T]`` sample index of each token.
        branches: ``[T]`` 0 in a sample's prefix, else the number of the branch.
        positions: ``[T]`` position of each token in its conversation.
    """

    samples: Tensor
    branches: Tensor
    positions: Tensor

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether token ``query`` attends to token ``key``; the index tensors are broadcast."""
        branch = self.branches[key]
        return (
            (self.samples[query] == self.samples[key])
            & ((branch == 0) | (branch == self.branches[query]))
            & (self.positions[key] <= self.positions[query])
        )

    def row_samples(self, lengths: Sequence[int], prefixes: Sequence[int]) -> list[RowSample]:
        """The samples of the row, for ``sample_sdpa``; ``lengths`` and ``prefixes`` count their tokens."""
        found, start = [], 0
        for length, prefix in zip(lengths, prefixes, strict=True):
            distance = None
            if prefix < length:
                tokens = torch.arange(start, start + length, device=self.branches.device)
                queries = tokens[prefix:, None]
                distance = self.positions[queries] - self.positions[tokens]
                distance = distance.masked_fill(~self.sees(queries, tokens), -1)
            found.append(RowSample(length, prefix, distance))
            start += length
        return found

    def block_mask(self) -> Any:
        """The same pattern as a block mask for flex attention."""
        return flex_block_mask(
            lambda _batch, _head, query, key: self.sees(query, key), len(self.branches), self.branches.device
        )


@dataclass
class Row:
    """What the LLM's forward is told about its rows.

    Attributes:
        samples: the samples of a packed row; empty: each row is one sample, padded on the right.
        numbers: ``[T]`` number of each token's sample, in a packed row.
        asked: whether the LLM has asked for a mask. If not, it builds its own, and nothing separates the samples.
    """

    samples: Sequence[RowSample] = ()
    numbers: Tensor | None = None
    asked: bool = False


current_row: ContextVar[Row | None] = ContextVar("current_row", default=None)
"""The row that the LLM's forward is running on; None outside of it, and for rows about which it is told nothing."""


class _UnreadableError(ConfigError, AttributeError):
    """So that ``hasattr`` answers no."""


class RowMask:
    """Which tokens a token of one layer attends to, in place of transformers' mask; only ``sample_sdpa`` reads it.

    Args:
        samples: as in ``Row``.
        window: number of positions that a token attends to, itself included; None: all.

    Raises:
        ConfigError: a layer calculates with it, as with a tensor.
    """

    def __init__(self, samples: Sequence[RowSample] = (), window: int | None = None) -> None:
        self.samples = samples
        self.window = window

    @classmethod
    def __torch_function__(cls, *_: Any) -> NoReturn:
        raise _UnreadableError(
            "the LLM's layers calculate with their attention mask, which optimization.attention=sdpa replaces by "
            "the boundaries of samples: set optimization.attention=eager"
        )

    def __getattr__(self, name: str) -> NoReturn:
        self.__torch_function__()

    def __getitem__(self, index: Any) -> NoReturn:
        self.__torch_function__()


def sample_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: RowMask | Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Causal attention within each sample, ``[B, T, heads, width]``.

    Args:
        query, key, value: ``[B, heads, T, width]``.
        attention_mask: the samples of a packed row, T tokens in total, or of padded rows; a tensor or None: stock SDPA.
    """
    if not isinstance(attention_mask, RowMask) or not attention_mask.samples:
        mask = _window(query, attention_mask.window) if isinstance(attention_mask, RowMask) else attention_mask
        rows: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, mask, **kwargs)
        return rows
    samples, window = attention_mask.samples, attention_mask.window
    lengths = [sample.length for sample in samples]
    parts = zip(*(values.split(lengths, dim=2) for values in (query, key, value)), strict=True)
    attended = []
    for sample, (queries, keys, values) in zip(samples, parts, strict=True):
        own = [part[:, :, : sample.prefix] for part in (queries, keys, values)]
        attended.append(sdpa_attention_forward(module, *own, _window(own[0], window), **kwargs)[0])
        if sample.distance is not None:
            seen = sample.distance >= 0
            if window is not None:
                seen &= sample.distance < window
            branches = queries[:, :, sample.prefix :]
            attended.append(sdpa_attention_forward(module, branches, keys, values, seen[None, None], **kwargs)[0])
    return torch.cat(attended, dim=1), None


def _window(query: Tensor, size: int | None) -> Tensor | None:
    """The sliding-window mask of a sample; None if the sample fits into the window, as SDPA is faster without one."""
    tokens = query.shape[2]
    if size is None or tokens <= size:
        return None
    seen = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device)
    return seen.tril().triu(1 - size)[None, None]


def row_mask(**wanted: Any) -> Any:
    """The mask of ``SAMPLE_SDPA``, asked for by ``masking_utils``: a ``RowMask``, or stock SDPA's outside of a row.

    The window is what the model asks for here, not what its layers pass to the attention function: some pass none
    (PhiMoE), some one that stock SDPA ignores (OLMoE).

    Raises:
        ConfigError: the samples of a packed row are to be separated, but the model asks for more than causal attention.
    """
    row = current_row.get()
    if row is None:
        return sdpa_mask(**wanted)
    row.asked = True
    if wanted["use_vmap"] or not wanted["allow_is_causal_skip"]:  # the model adds a rule of its own
        if row.samples:
            raise ConfigError(
                f"the LLM ({wanted['config'].model_type}) has an attention pattern beside causal attention, which "
                f"cannot be combined with packed rows: set {UNPACKED}"
            )
        return sdpa_mask(**wanted)
    return RowMask(row.samples, wanted.get("local_size"))


class _SeparatingMask:
    """A mask function of transformers whose masks also separate the samples of the current row, if it is packed."""

    def __init__(self, build: Callable[..., Any]) -> None:
        self.build = build

    def __call__(self, **wanted: Any) -> Any:
        row = current_row.get()
        if row is None or row.numbers is None:
            return self.build(**wanted)
        row.asked, numbers = True, row.numbers

        def same_sample(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return numbers[query] == numbers[key]

        separated = and_masks(wanted["mask_function"], same_sample)
        changes = {"mask_function": separated, "attention_mask": None, "allow_is_causal_skip": False}
        return self.build(**{**wanted, **changes})


class _BoundedAttention:
    """A flash attention of transformers, which checks that it is told where the samples of the current row begin."""

    def __init__(self, attend: Callable[..., Any]) -> None:
        self.attend = attend

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and current_row.get() is not None and FLASH_KEYS[0] not in kwargs:
            raise ConfigError(
                f"{type(module).__name__} is not told where the samples of a packed row begin, so they would attend to "
                f"each other: set optimization.attention=sdpa, or {UNPACKED}"
            )
        return self.attend(module, *args, **kwargs)


def separate_by_mask(name: str | None) -> None:
    """Lets transformers' attention ``name`` separate the samples of packed rows, from now on in this process.

    Without a packed row, transformers' own function does what it did. There is no other place at which all LLMs can be
    reached: the functions are looked up by the name of the attention, which also decides how the layers attend.
    """
    masks, attention = AttentionMaskInterface(), AttentionInterface()
    if name in ("eager", "sdpa", "flex_attention") and not isinstance(masks[name], _SeparatingMask):
        AttentionMaskInterface.register(name, _SeparatingMask(masks[name]))
    if name in ("flash_attention_2", "flash_attention_3") and not isinstance(attention[name], _BoundedAttention):
        AttentionInterface.register(name, _BoundedAttention(attention[name]))


AttentionInterface.register(SAMPLE_SDPA, sample_sdpa)
AttentionMaskInterface.register(SAMPLE_SDPA, row_mask)
