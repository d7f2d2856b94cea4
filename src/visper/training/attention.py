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
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from visper.common.compat import attention_of, flex_block_mask
from visper.common.errors import ConfigError
from visper.config import JOINING_ATTENTION, Run

SAMPLE_SDPA = "visper_sample_sdpa"
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
    """Causal attention ``[1, T, heads, width]`` of each sample to itself; without ``row_samples`` stock SDPA.

    Args:
        query, key, value: ``[1, heads, T, width]``.
        row_samples: the samples of the row, T tokens in sum.
        sliding_window: positions that a token of this layer sees, itself included.
    """
    if row_samples is None:
        unpacked: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return unpacked
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

    def row_samples(self, lengths: Sequence[int]) -> list[RowSample]:
        """The samples of the row, for ``sample_sdpa``; ``lengths`` are their tokens."""
        shared = (self.branches == 0).split(list(lengths))
        prefixes = torch.stack([own.sum() for own in shared]).tolist()  # read from a GPU once
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
    if run.packed:
        separate_samples(llm)
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
    mixing = sorted(set(getattr(llm.config, "layer_types", None) or ()) - SEPARABLE_LAYERS)
    if mixing:
        raise ConfigError(
            f"{type(llm).__name__} has layers of type {mixing}, which do not keep the samples of a row apart: set "
            "optimization.packing=false, data.join_conversations=false and data.group_by_length=true"
        )
    if attention_of(llm) == "sdpa":
        llm.set_attn_implementation(SAMPLE_SDPA)


@contextlib.contextmanager
def packed_rows(llm: Any, position_ids: Tensor | None, borders: Mapping[str, Any]) -> Iterator[None]:
    """Tells the LLM's forward where the samples of a packed row begin; the model around it need not know of them.

    Args:
        position_ids: ``[1, T]`` or ``[4, 1, T]`` (``own_positions``); None for unpacked rows.
        borders: see ``packing_arguments``.
    """
    told = packing_arguments(llm, position_ids, borders)

    def tell(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "attention_mask": None, **told}

    handle = llm.register_forward_pre_hook(tell, with_kwargs=True) if told else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


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
    lengths = borders["cu_seq_lens_q"].diff().tolist()

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
        borders: ``cu_seq_lens_q`` ``[samples + 1]`` and the others that ``data.packing`` makes; ``branches`` ``[1, T]``
            of joined samples.
    """
    if position_ids is None:
        return {}
    name, branches = attention_of(llm), borders.get("branches")
    if name != SAMPLE_SDPA and branches is None:
        return {"position_ids": position_ids, **borders}
    lengths = borders["cu_seq_lens_q"].diff()
    joined = None
    if branches is not None:
        numbers = torch.arange(len(lengths), device=branches.device).repeat_interleave(lengths)
        joined = Joined(numbers, branches[0], position_ids[0])
    if name != SAMPLE_SDPA:
        assert joined is not None and name == "flex_attention", name
        return {"position_ids": position_ids, "attention_mask": joined.block_mask()}
    # transformers takes a mask of four dimensions as it is: this one keeps it from building one, and is not read.
    unread = position_ids.new_zeros(1, 1, 1, 1)
    each = lengths.tolist()
    samples = [RowSample(length, length) for length in each] if joined is None else joined.row_samples(each)
    return {"position_ids": position_ids, "row_samples": samples, "attention_mask": unread}
