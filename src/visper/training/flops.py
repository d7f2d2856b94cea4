"""Model FLOPs: what one micro-batch's forward and backward pass compute, by torch's own formulas."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class CountFlops(TorchDispatchMode):
    """FLOPs of the operations inside, a multiplication and an addition counted as two, recomputation left out.

    The formulas are those of ``torch.utils.flop_counter.FlopCounterMode``, which cannot tell what gradient
    checkpointing computes a second time. Here it shows: a backward pass records no gradients of its own, recomputation
    does.

    Attributes:
        flops: so far.
        backward: whether a backward pass runs; set it around ``loss.backward()``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0
        self.backward = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None and not (self.backward and torch.is_grad_enabled()):
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        return result


def model_flops(model: nn.Module, batch: Mapping[str, Any]) -> float:
    """FLOPs of ``model(**batch)["loss"].backward()``: forward and backward once, nothing recomputed.

    The image encoder and the predictors are included, teachers are not. Gradients are added to the parameters'.
    """
    with CountFlops() as counter:
        loss = model(**batch)["loss"]
        counter.backward = True
        loss.backward()
    return counter.flops
