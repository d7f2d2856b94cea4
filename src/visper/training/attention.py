"""Sets up the LLM's attention, and tells its forward where the samples of a row are.

How samples are separated depends on the attention implementation (``training.row_attention``):

- ``sdpa`` becomes ``SAMPLE_SDPA``: the causal kernel runs on each sample separately. Stock SDPA would build a dense
  mask over all pairs of tokens, which is slower than padding (docs/speed.md). Runs on every device. The branches of a
  joined sample take a second call with a dense mask (branch tokens x sample tokens).
- ``flash_attention_2`` and ``3``: transformers calls the variable-length kernel with the sample boundaries.
- ``flex_attention`` and ``eager``: the block or dense mask that transformers builds also separates the samples. For
  joined samples, the entire block mask of flex attention is built here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from visper.common.compat import attention_of
from visper.common.errors import ConfigError
from visper.config import JOINING_ATTENTION, Run
from visper.model import Student
from visper.training.row_attention import (
    FLASH_KEYS,
    SAMPLE_SDPA,
    UNPACKED,
    Joined,
    Row,
    RowSample,
    current_row,
    separate_by_mask,
)

SEPARABLE_LAYERS = frozenset(("full_attention", "sliding_attention"))
"""Values of a config's ``layer_types`` whose layers can separate the samples of a row with every implementation."""
READ_THEIR_MASK = frozenset(("doge",))
"""Model types whose attention layers calculate with the mask tensor, and so keep stock SDPA."""
ROW = "row"
"""Key of the ``Row`` among the arguments for ``forwarding``."""


def choose_attention(run: Run, student: Student) -> None:
    """Sets ``optimization.attention`` on the student's LLM and prepares the LLM for packed or padded rows.

    Raises:
        ConfigError: the attention is not available here, or the LLM's layers cannot separate the samples of a row.
    """
    name, llm = run.optimization.attention, cast("Any", student.model.get_decoder())
    if name == "flex_attention" and not torch.cuda.is_available():
        raise ConfigError(
            "optimization.attention=flex_attention trains on GPUs only, and this machine has none: torch has no "
            "backward pass of it for CPUs. Set it to sdpa or eager"
        )
    if name is not None:
        try:
            llm.set_attn_implementation(name)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"optimization.attention={name} is not available: {error}") from error
    if run.packed:
        separate_samples(llm)
    elif student.is_llava and not _mixing_layers(llm):
        _attend_by_sample(llm)
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
            f"{UNPACKED}"
        )
    _attend_by_sample(llm)
    separate_by_mask(attention_of(llm))


def _mixing_layers(llm: Any) -> list[str]:
    """Kinds of layers that mix tokens by something else than attention with a mask."""
    named = {*(getattr(llm.config, "layer_types", None) or ())} - SEPARABLE_LAYERS
    # State-space layers and the like begin with a convolution over tokens, whatever their configuration calls them.
    layers = getattr(llm, "layers", ())
    convolutions = {type(part).__name__ for layer in layers for part in layer.modules() if isinstance(part, nn.Conv1d)}
    return sorted(named | convolutions)


def _attend_by_sample(llm: Any) -> None:
    if attention_of(llm) == "sdpa" and llm.config.model_type not in READ_THEIR_MASK:
        llm.set_attn_implementation(SAMPLE_SDPA)  # without effect on models that do not use transformers' interface


@contextlib.contextmanager
def forwarding(llm: Any, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Passes ``arguments`` to the LLM's forward inside the block, without changing the model that calls it.

    Args:
        arguments: of the LLM's forward, and the ``Row`` that it runs on.

    Raises:
        ConfigError: in the LLM's forward, which did not ask for a mask that separates the samples of a packed row.
    """
    if not arguments:
        yield
        return
    forwarded = dict(arguments)
    row: Row | None = forwarded.pop(ROW, None)

    def tell(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        current_row.set(row)
        return args, {**kwargs, "attention_mask": None, **forwarded}

    def check(module: nn.Module, args: Any, output: Any) -> None:
        current_row.set(None)
        if row is not None and row.samples and not row.asked:
            raise ConfigError(
                f"{type(module).__name__} does not build its attention mask by transformers' masking_utils, so nothing "
                f"separates the samples of a packed row: set {UNPACKED}"
            )

    handles = [llm.register_forward_pre_hook(tell, with_kwargs=True), llm.register_forward_hook(check)]
    try:
        yield
    finally:
        current_row.set(None)
        for handle in handles:
            handle.remove()


def padded_arguments(llm: Any, input_ids: Tensor) -> dict[str, Any]:
    """Arguments for ``forwarding`` about rows that have padding, if any, on the right only.

    Causal attention never reads that padding, so no mask is needed. Without these arguments, transformers compares
    position ids on the GPU to find out whether rows are packed, and the host waits for the result.
    """
    return {ROW: Row(), "attention_mask": _all_tokens(input_ids)} if attention_of(llm) == SAMPLE_SDPA else {}


def _all_tokens(like: Tensor) -> Tensor:
    """A mask without padding ``[B, T]``: given one, transformers does not look for packed rows in the position ids."""
    return torch.ones(like.shape[-2:], dtype=torch.long, device=like.device)


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
    """Arguments for ``forwarding`` that say where the samples of a packed row begin; none for unpacked rows.

    Args:
        position_ids: ``[1, T]``, from 0 in every sample, or ``[4, 1, T]`` (``own_positions``); None for unpacked rows.
        borders: the other batch entries of ``data.packing``, and for joined samples those of ``data.joining``.
    """
    if position_ids is None:
        return {}
    name, branches, lengths = attention_of(llm), borders.get("branches"), borders["lengths"]
    counts, tokens = borders["cu_seq_lens_q"].diff(), position_ids.shape[-1]
    numbers = torch.arange(len(lengths), device=counts.device).repeat_interleave(counts, output_size=tokens)
    samples = [RowSample(length, length) for length in lengths]
    given: dict[str, Any] = {"position_ids": position_ids, "attention_mask": _all_tokens(position_ids)}
    if branches is not None:
        joined = Joined(numbers, branches[0], position_ids[0])
        if name != SAMPLE_SDPA:
            assert name == "flex_attention", name
            return {**given, "attention_mask": joined.block_mask()}
        samples = joined.row_samples(lengths, borders["prefixes"])
    if str(name).startswith("flash"):
        # Flash attention takes no mask, but these arguments; its layers raise if they do not arrive.
        given = {"position_ids": position_ids, **{key: borders[key] for key in FLASH_KEYS}}
        return {**given, ROW: Row(samples, numbers, asked=True)}
    return {**given, ROW: Row(samples, numbers)}
