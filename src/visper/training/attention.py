"""Attention that separates the samples of a packed row, and the conversations of a joined sample.

How depends on the LLM's attention implementation:

- ``sdpa`` becomes ``SAMPLE_SDPA``: the causal kernel runs on each sample separately. Stock SDPA would build a dense
  mask over all pairs of tokens, which is slower than padding (docs/speed.md). Runs on every device. The branches of a
  joined sample take a second call with a dense mask (branch tokens x sample tokens).
- ``flash_attention_2`` and ``3``: transformers calls the variable-length kernel with the sample boundaries.
- ``flex_attention`` and ``eager``: transformers builds a block or dense mask from the position ids. For joined samples,
  this module builds the block mask for flex attention.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from visper.common.compat import attention_of, flex_block_mask
from visper.common.errors import ConfigError
from visper.config import JOINING_ATTENTION, Run
from visper.model import Student

SAMPLE_SDPA = "visper_sample_sdpa"
FLASH_KEYS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""transformers' arguments for the sample boundaries of a packed row (``FlashAttentionKwargs``)."""
SEPARABLE_LAYERS = frozenset(("full_attention", "sliding_attention"))
"""Values of a config's ``layer_types`` whose layers can separate the samples of a row with every implementation."""


def sample_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    row_samples: Sequence[RowSample] | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sample, ``[B, T, heads, width]``.

    Args:
        query, key, value: ``[B, heads, T, width]``.
        row_samples: the samples of a packed row, T tokens in total; empty: each row is one sample, padded on the right;
            None: stock SDPA with ``attention_mask``.
        sliding_window: number of positions that a token of this layer attends to, itself included.
    """
    if not row_samples:
        mask = attention_mask if row_samples is None else _window(query, sliding_window)
        rows: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, mask, **kwargs)
        return rows
    lengths = [sample.length for sample in row_samples]
    parts = zip(*(values.split(lengths, dim=2) for values in (query, key, value)), strict=True)
    attended = []
    for sample, (queries, keys, values) in zip(row_samples, parts, strict=True):
        own = [part[:, :, : sample.prefix] for part in (queries, keys, values)]
        attended.append(sdpa_attention_forward(module, *own, _window(own[0], sliding_window), **kwargs)[0])
        if sample.distance is not None:
            seen = sample.distance >= 0
            if sliding_window is not None:
                seen &= sample.distance < sliding_window
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


AttentionInterface.register(SAMPLE_SDPA, sample_sdpa)
AttentionMaskInterface.register(SAMPLE_SDPA, sdpa_mask)


def choose_attention(run: Run, student: Student) -> None:
    """Sets ``optimization.attention`` on the student's LLM and prepares the LLM for packed or padded rows.

    Raises:
        ConfigError: the attention is not available here, or the LLM's layers cannot separate the samples of a row.
    """
    name, llm = run.optimization.attention, cast("Any", student.model.get_decoder())
    if name is not None:
        try:
            llm.set_attn_implementation(name)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"optimization.attention={name} is not available: {error}") from error
    if run.packed:
        separate_samples(llm)
    elif student.is_llava and attention_of(llm) == "sdpa" and not _mixing_layers(llm):
        llm.set_attn_implementation(SAMPLE_SDPA)
    if run.data.join_conversations:
        require_joinable(llm)


def require_joinable(llm: Any) -> None:
    """Checks that the LLM's attention can separate conversations that share an image.

    Raises:
        ConfigError: it is neither SDPA nor flex attention, or it is flex attention with a sliding window.
    """
    name = attention_of(llm)
    if name not in (SAMPLE_SDPA, "flex_attention"):
        raise ConfigError(
            f"data.join_conversations is not supported with {type(llm).__name__}'s attention '{name}': set "
            f"optimization.attention to one of {', '.join(JOINING_ATTENTION)}, or data.join_conversations=false"
        )
    if name == "flex_attention" and getattr(llm.config, "sliding_window", None) is not None:
        raise ConfigError(
            "data.join_conversations is not supported with flex_attention and the sliding window of "
            f"{type(llm).__name__}: set optimization.attention=sdpa"
        )


def separate_samples(llm: Any) -> None:
    """Prepares ``llm`` for packed rows.

    Raises:
        ConfigError: some of its layers would carry state from one sample of a row into the next.
    """
    mixing = _mixing_layers(llm)
    if mixing:
        raise ConfigError(
            f"{type(llm).__name__} has layers of type {mixing}, which cannot separate the samples of a row: set "
            "optimization.packing=false, data.join_conversations=false and data.group_by_length=true"
        )
    if attention_of(llm) == "sdpa":
        llm.set_attn_implementation(SAMPLE_SDPA)


def _mixing_layers(llm: Any) -> list[str]:
    return sorted(set(getattr(llm.config, "layer_types", None) or ()) - SEPARABLE_LAYERS)


@contextlib.contextmanager
def told(llm: Any, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Passes ``arguments`` to the LLM's forward inside the block, without changing the model that calls it."""

    def tell(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "attention_mask": None, **arguments}

    handle = llm.register_forward_pre_hook(tell, with_kwargs=True) if arguments else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def padded_arguments(llm: Any, input_ids: Tensor) -> dict[str, Any]:
    """Arguments of the LLM's forward for rows that have padding, if any, on the right only.

    Causal attention never reads that padding, so no mask is needed. Without these arguments, transformers compares
    position ids on the GPU to find out whether rows are packed, and the host waits for the result.
    """
    return {"row_samples": (), "attention_mask": _unread(input_ids)} if attention_of(llm) == SAMPLE_SDPA else {}


def _unread(like: Tensor) -> Tensor:
    """A placeholder mask that nothing reads: transformers accepts a 4D mask as given instead of building its own."""
    return like.new_zeros(1, 1, 1, 1)


def own_positions(
    model: Any, input_ids: Tensor, position_ids: Tensor, borders: Mapping[str, Any], inputs: Mapping[str, Tensor]
) -> Tensor:
    """Position ids of a packed row in the format that ``model`` expects.

    For Qwen models ``[4, 1, T]``: first the text positions, by which transformers tells samples apart, then the time,
    height and width positions that the model computes for each sample alone. For other models ``position_ids``
    unchanged, ``[1, T]``.

    Args:
        inputs: the model's inputs other than the token ids.
    """
    if not hasattr(model, "get_rope_index"):
        return position_ids
    lengths = borders["lengths"]

    def apart(values: Tensor) -> Tensor:
        return pad_sequence(list(values[0].split(lengths)), batch_first=True)

    attended = apart(torch.ones_like(input_ids))
    positions, _ = model.get_rope_index(
        apart(input_ids),
        attention_mask=attended,
        mm_token_type_ids=apart(inputs["mm_token_type_ids"]),
        image_grid_thw=inputs.get("image_grid_thw"),
    )
    return torch.cat((position_ids[None], positions[:, None, attended.bool()]))


def packing_arguments(llm: Any, position_ids: Tensor | None, borders: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that tell the LLM's forward where the samples of a packed row begin; none for unpacked rows.

    Args:
        position_ids: ``[1, T]``, from 0 in every sample, or ``[4, 1, T]`` (``own_positions``); None for unpacked rows.
        borders: the other batch entries of ``data.packing``, and for joined samples those of ``data.joining``.
    """
    if position_ids is None:
        return {}
    name, branches, lengths = attention_of(llm), borders.get("branches"), borders["lengths"]
    if branches is None:
        if name != SAMPLE_SDPA:
            return {"position_ids": position_ids, **{key: borders[key] for key in FLASH_KEYS}}
        samples = [RowSample(length, length) for length in lengths]
    else:
        counts = borders["cu_seq_lens_q"].diff()
        numbers = torch.arange(len(lengths), device=branches.device).repeat_interleave(
            counts, output_size=branches.numel()
        )
        joined = Joined(numbers, branches[0], position_ids[0])
        if name != SAMPLE_SDPA:
            assert name == "flex_attention", name
            return {"position_ids": position_ids, "attention_mask": joined.block_mask()}
        samples = joined.row_samples(lengths, borders["prefixes"])
    return {"position_ids": position_ids, "row_samples": samples, "attention_mask": _unread(position_ids)}
