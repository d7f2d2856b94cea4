"""Hidden states of selected decoder layers, captured by forward hooks.

Hooks are used because ``output_hidden_states`` keeps the states of every layer and differs between transformers
versions. They give the same values and gradients with and without (non-reentrant) gradient checkpointing.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

FINAL_NORMS = ("norm", "final_layernorm", "final_norm", "ln_f", "embedding_norm")
"""Attribute names that decoders use for the norm after the last layer."""


class HiddenStateTap:
    """Captures hidden states while it is open: ``with HiddenStateTap(decoder, (8, 20)) as hidden: ...``.

    ``hidden`` maps each layer to its states ``[B, L, D]`` in the latest forward pass; leaving the block empties it.

    Args:
        decoder: the text model, with ``layers`` and a final norm (``model.get_decoder()``).
        layers: decoder layers, counted from 1; 0 is the input of the first layer. The last layer's states are taken
            after the final norm, as in the published code.

    Raises:
        ValueError: the decoder has no such layer, or the last layer is tapped and no final norm is found.
    """

    def __init__(self, decoder: nn.Module, layers: Iterable[int]) -> None:
        stack = getattr(decoder, "layers", None)
        if not isinstance(stack, nn.ModuleList):
            raise ValueError(f"{type(decoder).__name__} has no list 'layers': pass the model's get_decoder()")
        self._modules = {layer: _module_of(decoder, stack, layer) for layer in layers}
        self._handles: list[RemovableHandle] = []
        self._caught: dict[int, Tensor] = {}

    def __enter__(self) -> dict[int, Tensor]:
        for layer, module in self._modules.items():
            if layer == 0:
                self._handles.append(module.register_forward_pre_hook(self._catch_input, with_kwargs=True))
            else:
                self._handles.append(module.register_forward_hook(partial(self._catch, layer)))
        return self._caught

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._caught.clear()

    def _catch_input(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._caught[0] = args[0] if args else kwargs["hidden_states"]

    def _catch(self, layer: int, module: nn.Module, args: Any, output: Any) -> None:
        self._caught[layer] = output[0] if isinstance(output, tuple) else output


def _module_of(decoder: nn.Module, stack: nn.ModuleList, layer: int) -> nn.Module:
    """The module whose output is the states of ``layer``; for 0, whose input."""
    if not 0 <= layer <= len(stack):
        raise ValueError(f"layer {layer} does not exist: the model has layers 1 to {len(stack)}")
    if layer < len(stack):
        return stack[max(0, layer - 1)]
    for name in FINAL_NORMS:
        norm = getattr(decoder, name, None)
        if isinstance(norm, nn.Module):
            return norm
    raise ValueError(
        f"layer {layer} is the last of {type(decoder).__name__}, which has no final norm named "
        f"{', '.join(FINAL_NORMS)}: tap an earlier layer"
    )


class InputTap:
    """Captures a module's input while it is open: ``with InputTap(projector) as inputs: ...``; one entry per call."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._caught: list[Tensor] = []

    def __enter__(self) -> list[Tensor]:
        self._handle = self._module.register_forward_pre_hook(self._catch, with_kwargs=True)
        return self._caught

    def __exit__(self, *error: object) -> None:
        self._handle.remove()
        self._caught.clear()

    def _catch(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._caught.append(args[0] if args else next(iter(kwargs.values())))
