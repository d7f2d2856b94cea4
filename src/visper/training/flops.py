"""Model FLOPs: what one micro-batch's forward and backward pass compute, by torch's own formulas."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def model_flops(model: nn.Module, batch: Mapping[str, Any]) -> float:
    """FLOPs of ``model(**batch)["loss"].backward()``, a multiplication and an addition counted as two.

    The image encoder and the predictors are included, at the batch's own lengths; teachers are not. Turn gradient
    checkpointing off first: what it computes again would be counted again. So is the LLM's head for more supervised
    tokens than ``module.LOGIT_ROWS``. Gradients are added to the parameters'.
    """
    with FlopCounterMode(display=False) as counter:
        model(**batch)["loss"].backward()
    return float(counter.get_total_flops())
