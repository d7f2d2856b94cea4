"""Private APIs of other libraries: one function each, with the versions it was checked with.

``tests/common/test_compat.py`` fails if one of them is gone, or if another file uses a private name of a library.
Names that transformers documents for subclasses to define (``_supports_sdpa``, ``_init_weights``) are not listed here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

TRAINER_METHODS = (
    "_get_grad_norm",
    "_get_train_sampler",
    "_load_from_checkpoint",
    "_load_optimizer_and_scheduler",
    "_move_model_to_device",
    "_save_checkpoint",
    "_save_optimizer_and_scheduler",
)
"""Private methods of transformers' Trainer that ``training.trainer`` overrides (transformers 5.17 to 5.24)."""


def attention_of(model: Any) -> str | None:
    """The name of the attention function that a transformers model uses (transformers 5.17 to 5.24).

    Setting it (``set_attn_implementation``) is public, reading it is not.
    """
    name: str | None = model.config._attn_implementation
    return name


def save_under_published_names(model: Any) -> None:
    """Makes ``save_pretrained`` use the published weight names for an assembled model, as it does for a loaded one.

    ``from_pretrained`` records on the model how it renamed the weights, and ``save_pretrained`` undoes that. Without
    this record, CLIP's ``vision_tower.vision_model.`` prefix is missing from the saved names; vLLM and older
    transformers expect it (transformers 5.17 to 5.24).
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)


def recompute_layers(model: Any) -> None:
    """Turns on non-reentrant gradient checkpointing in every layer of a transformers model.

    transformers 5.2x renamed the method; 5.17 has only the old name. Reentrant checkpointing would lose the gradients
    of forward hooks, and needs embeddings whose outputs require gradients, for which a frozen encoder would keep its
    activations. transformers sets up such embeddings in both modes, so this is undone.
    """
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.disable_input_require_grads()


def merge_in_one_precision(model: Any) -> None:
    """Casts image features to the dtype of the text embeddings before the base model merges them.

    SmolVLM merges by assignment, which fails if autocast gives the two different dtypes (transformers 5.17 to 5.20, the
    last for Python 3.10; 5.21 does not have the method).
    """
    merge = getattr(model, "inputs_merger", None)
    if merge is None:
        return

    def merged(input_ids: Any, inputs_embeds: Any, image_hidden_states: Any) -> Any:
        return merge(input_ids, inputs_embeds, image_hidden_states.to(inputs_embeds.dtype))

    model.inputs_merger = merged


def flop_formulas() -> dict[Any, Callable[..., int]]:
    """torch's FLOP formulas by operation, plus one for fused attention on CPU, which torch 2.9 lacks.

    The GPU's formula is used for it (torch 2.9 to 2.15).
    """
    from torch import ops
    from torch.utils.flop_counter import flop_registry

    fused = flop_registry[ops.aten._scaled_dot_product_flash_attention]
    return {ops.aten._scaled_dot_product_flash_attention_for_cpu: fused, **flop_registry}


def is_partitioned(parameter: Any) -> bool:
    """Whether DeepSpeed's ZeRO-3 has partitioned ``parameter`` (DeepSpeed 0.18 to 0.19).

    transformers uses the same test.
    """
    return hasattr(parameter, "ds_id")


def forget_adapters(model: Any) -> None:
    """Removes peft's configuration from a model with merged adapters, which transformers would otherwise save as an
    adapter (peft 0.17 to 0.21)."""
    model.__dict__.pop("peft_config", None)


def flex_block_mask(sees: Any, tokens: int, device: Any) -> Any:
    """Flex attention's block mask for one row of ``tokens`` tokens, the same for all heads (torch 2.9 to 2.15).

    It is built by a compiled function on a GPU, which avoids a mask of all pairs of tokens.

    Args:
        sees: ``sees(batch, head, query, key)`` tells whether a query attends to a key.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(sees, None, None, tokens, tokens, device=str(device), _compile=device.type == "cuda")


def shard_metadata(offsets: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """The safetensors metadata that tells torch's ``HuggingFaceStorageReader`` each shard's offsets in its parameter
    (torch 2.9 to 2.15)."""
    places = {name: {"saved_offsets": list(offset)} for name, offset in offsets.items()}
    return {"DCP_SHARDING_INFO": json.dumps(places), "DCP_VERSION": "1.0", "format": "pt"}


def compile_error() -> type[Exception]:
    """The exception that ``torch.compile`` raises if it cannot compile a function (torch 2.9 to 2.15)."""
    from torch._dynamo.exc import TorchDynamoException

    return TorchDynamoException


def around_operations(handle: Callable[..., Any]) -> AbstractContextManager[Any]:
    """A context manager under which ``handle(operation, args, kwargs)`` replaces each torch operation and returns its
    result (torch 2.9 to 2.15)."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Around(TorchDispatchMode):
        supports_higher_order_operators = True  # flex attention is one

        @classmethod
        def ignore_compile_internals(cls) -> bool:  # or flex attention, which compiles itself, fails under it
            return True

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return handle(func, args, kwargs or {})

    return Around()


def sees_operations() -> bool:
    """Whether a dispatch mode such as that of ``around_operations`` is active (torch 2.9 to 2.15)."""
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    return _get_current_dispatch_mode() is not None


def sees_around_compiled() -> bool:
    """Whether compiled functions run under ``around_operations`` (not in torch 2.9 to 2.11; in 2.15)."""
    from torch.utils._python_dispatch import TorchDispatchMode

    return hasattr(TorchDispatchMode, "ignore_compile_internals")
