"""What is used of other libraries without their promise to keep it: one function each, with the versions tried.

``tests/common/test_compat.py`` fails when one of them is gone, or when another file reads a private name of a library.
Not here: what transformers documents for subclasses to define (``_supports_sdpa``, ``_init_weights``).
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
"""Private methods of transformers' Trainer that the stage's trainer overrides (transformers 5.17 to 5.23)."""


def attention_of(model: Any) -> str | None:
    """The name of the attention function that a transformers model calls (transformers 5.17 to 5.23).

    ``set_attn_implementation`` is public, reading it back is not.
    """
    name: str | None = model.config._attn_implementation
    return name


def save_under_published_names(model: Any) -> None:
    """Lets ``save_pretrained`` name the weights of a model that was assembled as it names those of a loaded one.

    ``from_pretrained`` notes on the model how it renamed the weights, for ``save_pretrained`` to undo. Without that
    note CLIP's ``vision_tower.vision_model.`` prefix is left out, which vLLM and older transformers expect
    (transformers 5.17 to 5.23).
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)


def recompute_layers(model: Any) -> None:
    """Turns gradient checkpointing on in every layer of a transformers model, not re-entrant.

    transformers 5.2x renamed the method; 5.17 has the old name only. The re-entrant kind would lose the gradients of
    forward hooks, and would need embeddings whose outputs require gradients: a frozen encoder would keep its
    activations for a backward pass through it. transformers sets that up for either kind, so it is undone.
    """
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.disable_input_require_grads()


def merge_in_one_precision(model: Any) -> None:
    """Gives image features the precision of the embeddings in whose places ``model``, without its head, puts them.

    SmolVLM's method for it assigns, which fails with the two precisions of autocast (transformers 5.17 to 5.20, the
    last for Python 3.10; 5.21 has no such method).
    """
    merge = getattr(model, "inputs_merger", None)
    if merge is None:
        return

    def merged(input_ids: Any, inputs_embeds: Any, image_hidden_states: Any) -> Any:
        return merge(input_ids, inputs_embeds, image_hidden_states.to(inputs_embeds.dtype))

    model.inputs_merger = merged


def flop_formulas() -> dict[Any, Callable[..., int]]:
    """torch's formulas of FLOPs, by operation, with that of fused attention on a CPU, which torch 2.9 lacks.

    It is that of a GPU's (torch 2.9 to 2.15).
    """
    from torch import ops
    from torch.utils.flop_counter import flop_registry

    fused = flop_registry[ops.aten._scaled_dot_product_flash_attention]
    return {ops.aten._scaled_dot_product_flash_attention_for_cpu: fused, **flop_registry}


def is_partitioned(parameter: Any) -> bool:
    """Whether DeepSpeed's ZeRO-3 has split ``parameter`` over the processes (DeepSpeed 0.18 to 0.19).

    transformers asks the same way.
    """
    return hasattr(parameter, "ds_id")


def forget_adapters(model: Any) -> None:
    """Removes peft's configuration from a model whose adapters are merged: transformers would save it as an adapter
    (peft 0.17 to 0.21)."""
    model.__dict__.pop("peft_config", None)


def flex_block_mask(sees: Any, tokens: int, device: Any) -> Any:
    """Flex attention's mask of one row of ``tokens``, alike for all heads, by ``sees(batch, head, query, key)``.

    Compiled on a GPU, where all pairs of tokens would otherwise be written out first (torch 2.9 to 2.15).
    """
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(sees, None, None, tokens, tokens, device=str(device), _compile=device.type == "cuda")


def shard_metadata(offsets: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """A safetensors file's metadata, from which torch's ``HuggingFaceStorageReader`` reads where in its parameter each
    shard begins (torch 2.9 to 2.15)."""
    places = {name: {"saved_offsets": list(offset)} for name, offset in offsets.items()}
    return {"DCP_SHARDING_INFO": json.dumps(places), "DCP_VERSION": "1.0", "format": "pt"}


def compile_error() -> type[Exception]:
    """What ``torch.compile`` raises where a function cannot be compiled (torch 2.9 to 2.15)."""
    from torch._dynamo.exc import TorchDynamoException

    return TorchDynamoException


def around_operations(handle: Callable[..., Any]) -> AbstractContextManager[Any]:
    """While it is entered, ``handle(operation, args, kwargs)`` stands for each of torch's operations and returns its
    result (torch 2.9 to 2.15)."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Around(TorchDispatchMode):
        supports_higher_order_operators = True  # flex attention is one

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return handle(func, args, kwargs or {})

    return Around()


def sees_operations() -> bool:
    """Whether something such as ``around_operations`` is entered (torch 2.9 to 2.15)."""
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    return _get_current_dispatch_mode() is not None
