"""Attention that keeps the samples of a packed row apart, and the conversations of a joined sample.

Three ways, by the attention function of the LLM:

- ``sdpa`` becomes ``SAMPLE_SDPA``: the causal kernel on each sample alone. Stock SDPA would build a dense mask of all
  pairs of tokens, which is slower than padding (docs/speed.md); this runs on every device. The branches of a joined
  sample get a second call, with a dense mask of their tokens x the sample's.
- ``flash_attention_2`` and ``3``: transformers calls the kernel for variable lengths with the borders of the samples.
- ``flex_attention`` and ``eager``: transformers builds a mask from the position ids, in blocks or dense. For joined
  samples this file gives flex attention a block mask.
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
"""transformers' names for the samples of a packed row (``FlashAttentionKwargs``)."""
SEPARABLE_LAYERS = frozenset(("full_attention", "sliding_attention"))
"""Values of a config's ``layer_types`` whose layers keep the samples of a row apart in all of these ways."""


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
    """Causal attention ``[B, T, heads, width]`` of each sample to itself; without ``row_samples`` stock SDPA.

    Args:
        query, key, value: ``[B, heads, T, width]``.
        row_samples: the samples of a packed row, T tokens in sum; empty: each row is one sample, padded on the right.
        sliding_window: positions that a token of this layer sees, itself included.
    """
    if row_samples is None:
        unpacked: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return unpacked
    if not row_samples:
        rows: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, _window(query, sliding_window), **kwargs
        )
        return rows
    lengths = [sample.length for sample in row_samples]
    parts = zip(*(values.split(lengths, dim=2) for values in (query, key, value)), strict=True)
    attended = []
    for sample, (asks, keys, values) in zip(row_samples, parts, strict=True):
        own = [of[:, :, : sample.prefix] for of in (asks, keys, values)]
        attended.append(sdpa_attention_forward(module, *own, _window(own[0], sliding_window), **kwargs)[0])
        if sample.distance is not None:
            seen = sample.distance >= 0
            if sliding_window is not None:
                seen &= sample.distance < sliding_window
            branches = asks[:, :, sample.prefix :]
            attended.append(sdpa_attention_forward(module, branches, keys, values, seen[None, None], **kwargs)[0])
    return torch.cat(attended, dim=1), None


def _window(query: Tensor, size: int | None) -> Tensor | None:
    """The mask of a sample that is longer than its layer's window; shorter samples need none, which is faster."""
    tokens = query.shape[2]
    if size is None or tokens <= size:
        return None
    seen = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device)
    return seen.tril().triu(1 - size)[None, None]


@dataclass(frozen=True)
class RowSample:
    """A sample of a packed row: ``length`` tokens, the first ``prefix`` of which are seen by all that follow.

    Attributes:
        distance: ``[length - prefix, length]``, by how many positions a token is behind another one that it sees; -1
            where it does not see it. None where the sample is all prefix.
    """

    length: int
    prefix: int
    distance: Tensor | None = None


@dataclass(frozen=True)
class Joined:
    """Which tokens of a packed row see which: those of the prefix and of their own branch up to their own position.

    Args:
        samples: ``[T]`` the sample of each token.
        branches: ``[T]`` 0 in a sample's prefix, else the number of the branch.
        positions: ``[T]``.
    """

    samples: Tensor
    branches: Tensor
    positions: Tensor

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether token ``query`` sees token ``key``, for indices that broadcast."""
        branch = self.branches[key]
        return (
            (self.samples[query] == self.samples[key])
            & ((branch == 0) | (branch == self.branches[query]))
            & (self.positions[key] <= self.positions[query])
        )

    def row_samples(self, lengths: Sequence[int], prefixes: Sequence[int]) -> list[RowSample]:
        """The samples of the row, for ``sample_sdpa``; ``lengths`` and ``prefixes`` are their tokens."""
        found, start = [], 0
        for length, prefix in zip(lengths, prefixes, strict=True):
            distance = None
            if prefix < length:
                tokens = torch.arange(start, start + length, device=self.branches.device)
                asks = tokens[prefix:, None]
                distance = self.positions[asks] - self.positions[tokens]
                distance = distance.masked_fill(~self.sees(asks, tokens), -1)
            found.append(RowSample(length, prefix, distance))
            start += length
        return found

    def block_mask(self) -> Any:
        """The same for flex attention."""
        return flex_block_mask(
            lambda _batch, _head, query, key: self.sees(query, key), len(self.branches), self.branches.device
        )


AttentionInterface.register(SAMPLE_SDPA, sample_sdpa)
AttentionMaskInterface.register(SAMPLE_SDPA, sdpa_mask)


def choose_attention(run: Run, student: Student) -> None:
    """Sets the attention that the run names on the student's LLM, and prepares it for the rows that the run makes.

    Raises:
        ConfigError: the attention is not available here, or the LLM's layers cannot keep the samples of a row apart.
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
    """Refuses an LLM whose attention cannot separate conversations that share an image.

    Raises:
        ConfigError: it is neither SDPA nor flex attention, or flex attention over a sliding window.
    """
    name = attention_of(llm)
    if name not in (SAMPLE_SDPA, "flex_attention"):
        raise ConfigError(
            f"data.join_conversations is not supported with {type(llm).__name__}'s attention '{name}': set "
            f"optimization.attention to one of {', '.join(JOINING_ATTENTION)}, or data.join_conversations=false"
        )
    if name == "flex_attention" and getattr(llm.config, "sliding_window", None) is not None:
        raise ConfigError(
            f"data.join_conversations is not supported with flex_attention over {type(llm).__name__}'s sliding window: "
            "set optimization.attention=sdpa"
        )


def separate_samples(llm: Any) -> None:
    """Prepares ``llm`` for packed rows.

    Raises:
        ConfigError: it has layers that carry something from one sample of a row into the next.
    """
    mixing = _mixing_layers(llm)
    if mixing:
        raise ConfigError(
            f"{type(llm).__name__} has layers of type {mixing}, which do not keep the samples of a row apart: set "
            "optimization.packing=false, data.join_conversations=false and data.group_by_length=true"
        )
    if attention_of(llm) == "sdpa":
        llm.set_attn_implementation(SAMPLE_SDPA)


def _mixing_layers(llm: Any) -> list[str]:
    return sorted(set(getattr(llm.config, "layer_types", None) or ()) - SEPARABLE_LAYERS)


@contextlib.contextmanager
def told(llm: Any, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Gives the LLM's forward more ``arguments``; the model around it need not know of them."""

    def tell(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "attention_mask": None, **arguments}

    handle = llm.register_forward_pre_hook(tell, with_kwargs=True) if arguments else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def padded_arguments(llm: Any, input_ids: Tensor) -> dict[str, Any]:
    """Arguments that tell the LLM's forward that its rows are padded on the right, if at all.

    Causal attention never looks there, so that no mask is needed. Without these arguments transformers compares
    position ids on the GPU to find out whether rows are packed, and the host waits for it.
    """
    return {"row_samples": (), "attention_mask": _unread(input_ids)} if attention_of(llm) == SAMPLE_SDPA else {}


def _unread(like: Tensor) -> Tensor:
    """A mask that keeps transformers from building one: of four dimensions it is taken as it is. It is not read."""
    return like.new_zeros(1, 1, 1, 1)


def own_positions(
    model: Any, input_ids: Tensor, position_ids: Tensor, borders: Mapping[str, Any], inputs: Mapping[str, Tensor]
) -> Tensor:
    """Positions of a packed row as ``model`` counts them.

    Qwen's have a time, a height and a width: ``[4, 1, T]``, first those of the text, by which transformers tells
    samples apart, then what the model's own method gives each sample alone. Others: ``position_ids``, ``[1, T]``.

    Args:
        inputs: what the model reads beside ids.
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
        borders: what else ``data.packing`` tells of the samples, and ``data.joining`` of joined ones.
    """
    if position_ids is None:
        return {}
    name, branches, lengths = attention_of(llm), borders.get("branches"), borders["lengths"]
    if name != SAMPLE_SDPA and branches is None:
        return {"position_ids": position_ids, **{key: borders[key] for key in FLASH_KEYS}}
    joined = None
    if branches is not None:
        counts = borders["cu_seq_lens_q"].diff()
        numbers = torch.arange(len(lengths), device=branches.device).repeat_interleave(
            counts, output_size=branches.numel()
        )
        joined = Joined(numbers, branches[0], position_ids[0])
    if name != SAMPLE_SDPA:
        assert joined is not None and name == "flex_attention", name
        return {"position_ids": position_ids, "attention_mask": joined.block_mask()}
    if joined is None:
        samples = [RowSample(length, length) for length in lengths]
    else:
        samples = joined.row_samples(lengths, borders["prefixes"])
    return {"position_ids": position_ids, "row_samples": samples, "attention_mask": _unread(position_ids)}
