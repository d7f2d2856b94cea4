"""Model FLOPs: what forward and backward passes compute of a model, at true lengths; one definition for plan and log.

A multiplication and an addition count as two. Counted are the LLM at every token that is no padding, its head at
supervised tokens, image encoder, projector and predictors; attention as if it were not causal (arXiv 2204.02311,
appendix B). Not counted: teachers, padding, and what is computed a second time for the backward pass.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from visper.common.compat import around_operations, flop_formulas
from visper.common.gpus import peak_of
from visper.data.collator import Sizes
from visper.model.parts import PROJECTOR, VISION, modules_of
from visper.training.module import TrainingModel

logger = logging.getLogger(__name__)

aten = torch.ops.aten
FORMULAS = flop_formulas()
BIAS_FIRST = (aten.addmm, aten.baddbmm)
"""Products whose factors are the second and third argument."""
DECODER = ("llm", "layers")
"""Regions of the decoder: beside its layers, and these."""
NOT_LINEAR = (aten.bmm, aten.baddbmm)
"""Products of eager attention; in the LLM they are left to ``Costs.pair``, as fused attention is."""


@dataclass(frozen=True)
class Costs:
    """FLOPs of forward and backward, none computed twice.

    Attributes:
        token: of the decoder's layers but attention, for each token.
        pair: of their attention, for each pair of tokens of a sample.
        answer: of the LLM's head, for each supervised token.
        image_token: of encoder, projector and predictors, for each image token; None: no image was seen yet.
    """

    token: float
    pair: float
    answer: float
    image_token: float | None

    def flops(self, tokens: int, pairs: int, supervised: int, image_tokens: int) -> float:
        """Of so much of each (``data.collator.Sizes``)."""
        text = self.token * tokens + self.pair * pairs + self.answer * supervised
        return text + (self.image_token or 0.0) * image_tokens


class FlopMeter:
    """Finds a model's ``costs`` in the first forward passes under ``watch``: one with an image is enough.

    Args:
        stands_for: how many of the decoder's equal layers each one that runs stands for.
    """

    def __init__(self, stands_for: Fraction = Fraction(1)) -> None:
        self.costs: Costs | None = None
        self._stands_for = stands_for

    @contextlib.contextmanager
    def watch(self, model: TrainingModel, operated: int, sizes: Sizes) -> Iterator[None]:
        """Counts the forward pass inside, if the costs are not known yet.

        Args:
            operated: tokens of the batch, padding included.
            sizes: of the batch.
        """
        if self.costs is not None and (self.costs.image_token is not None or not sizes.image_tokens):
            yield
            return
        llm, text = model.student.get_decoder(), model.student.config.get_text_config()
        products = Products()
        with around_operations(products.count), _regions(model, products):
            yield
        width = text.num_attention_heads * (
            getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        )
        head: Any = model.student.get_output_embeddings()
        self.costs = Costs(
            token=float(products.counts["llm"] + int(products.counts["layers"]) * self._stands_for) / operated,
            pair=3.0 * 4 * width * len(llm.layers),
            answer=2.0 * head.in_features * head.out_features * (3 if head.weight.requires_grad else 2),
            image_token=products.counts["image"] / sizes.image_tokens if sizes.image_tokens else None,
        )


class Products:
    """FLOPs of every product by the ``region`` it is called in, those of its gradients included.

    Each factor that needs a gradient costs as much again as the product.
    """

    def __init__(self, region: str = "") -> None:
        self.region = region
        self.counts = {"": 0.0, "llm": 0.0, "layers": 0.0, "image": 0.0}

    def count(self, operation: Any, args: Any, kwargs: Any) -> Any:
        """Runs ``operation`` and counts it."""
        result, kind = operation(*args, **kwargs), getattr(operation, "overloadpacket", operation)
        if self.region and kind in FORMULAS and (self.region not in DECODER or _is_linear(kind)):
            factors = args[1:3] if kind in BIAS_FIRST else args[:2]
            asked = sum(isinstance(f, Tensor) and f.requires_grad for f in factors) if torch.is_grad_enabled() else 0
            self.counts[self.region] += FORMULAS[kind](*args, **kwargs, out_val=result) * (1 + asked)
        return result


def _is_linear(kind: Any) -> bool:
    return kind not in NOT_LINEAR and "attention" not in str(kind)


@contextlib.contextmanager
def _regions(model: TrainingModel, products: Products) -> Iterator[None]:
    """Names the region while the modules run: the decoder is part of the student's base model."""
    handles = []

    def region(module: nn.Module, name: str) -> None:
        outer: list[str] = []

        def enter(*_: Any) -> None:
            outer.append(products.region)
            products.region = name

        def leave(*_: Any) -> None:
            products.region = outer.pop()

        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave))

    # Of a LLaVA, encoder and projector are called by the training model, not by the student.
    for part in (VISION, PROJECTOR):
        for place in modules_of(model.student, part):
            region(model.student.get_submodule(place), "image")
    region(model.student.model, "image")
    decoder = model.student.get_decoder()
    region(decoder, "llm")
    for layer in decoder.layers:
        region(layer, "layers")
    if model.objective is not None:
        region(model.objective, "image")
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def known_peak(device: torch.device) -> float | None:
    """Peak FLOPs per second of the device; None on a CPU, and, with a warning, on a GPU that ``common.gpus`` lacks."""
    peak = peak_of(device)
    if peak is None and device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        logger.warning(f"the log has no 'mfu': the peak FLOPs of '{name}' are not in the table of visper.common.gpus")
    return peak
