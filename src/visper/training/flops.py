"""Model FLOPs of forward and backward passes, without padding; the same definition in plan and log.

A multiplication and an addition count as two. Counted: the LLM at every token except padding, its head at supervised
tokens, image encoder, projector and predictors; attention as if it were not causal (arXiv 2204.02311, appendix B). Not
counted: teachers, padding, and recomputation in the backward pass.
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

from visper.common.compat import around_operations, attention_of, flop_formulas, sees_around_compiled
from visper.common.gpus import peak_of
from visper.data.collator import Sizes
from visper.model.parts import PROJECTOR, VISION, modules_of
from visper.training.module import TrainingModel

logger = logging.getLogger(__name__)

aten = torch.ops.aten
FORMULAS = flop_formulas()
BIAS_FIRST = (aten.addmm, aten.baddbmm)
"""Matrix products whose factors are the second and third arguments."""
DECODER = ("llm", "layers")
"""Regions inside the decoder: its layers, and everything else in it ("llm")."""
NOT_LINEAR = (aten.bmm, aten.baddbmm)
"""Matrix products of eager attention; in the LLM they are counted in ``Costs.pair``, as fused attention is."""


@dataclass(frozen=True)
class Costs:
    """FLOPs of forward and backward passes, without recomputation.

    Attributes:
        token: of the decoder except attention, per token.
        pair: of the decoder's attention, per pair of tokens in a sample.
        answer: of the LLM's head, per supervised token.
        image_token: of encoder, projector and predictors, per image token; None until a batch with an image is seen.
        recomputed: of one more forward pass through all of the decoder's layers except attention, per token.
    """

    token: float
    pair: float
    answer: float
    image_token: float | None
    recomputed: float

    def flops(self, tokens: int, pairs: int, supervised: int, image_tokens: int) -> float:
        """The FLOPs of a batch with these counts (``data.collator.Sizes``)."""
        text = self.token * tokens + self.pair * pairs + self.answer * supervised
        return text + (self.image_token or 0.0) * image_tokens

    def recomputation(self, tokens: int, pairs: int) -> float:
        """The further FLOPs if all layers of the decoder are recomputed in the backward pass."""
        return self.recomputed * tokens + self.pair / 3 * pairs


class FlopMeter:
    """Measures a model's ``costs`` in the first forward passes under ``watch``, until one had an image.

    Args:
        stands_for: layers of the full decoder per layer that runs, if only some of its identical layers do.
    """

    def __init__(self, stands_for: Fraction = Fraction(1)) -> None:
        self.costs: Costs | None = None
        self._stands_for = stands_for

    @contextlib.contextmanager
    def watch(self, model: TrainingModel, operated: int, sizes: Sizes) -> Iterator[None]:
        """Counts the FLOPs of the forward pass inside the block, unless the costs are known already.

        Args:
            operated: tokens of the batch, padding included.
            sizes: the sizes of the batch.
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
            recomputed=float(int(products.forward["layers"]) * self._stands_for) / operated,
        )


class Products:
    """FLOPs of all matrix products, including their gradients, by the ``region`` in which they are called.

    The gradient of each factor that requires one costs as much as the product itself; ``forward`` leaves gradients out.
    """

    def __init__(self, region: str = "") -> None:
        self.region = region
        self.counts = {"": 0.0, "llm": 0.0, "layers": 0.0, "image": 0.0}
        self.forward = dict(self.counts)

    def count(self, operation: Any, args: Any, kwargs: Any) -> Any:
        """Runs ``operation`` and counts it."""
        result, kind = operation(*args, **kwargs), getattr(operation, "overloadpacket", operation)
        if self.region and kind in FORMULAS and (self.region not in DECODER or _is_linear(kind)):
            factors = args[1:3] if kind in BIAS_FIRST else args[:2]
            grads = sum(isinstance(f, Tensor) and f.requires_grad for f in factors) if torch.is_grad_enabled() else 0
            flops = FORMULAS[kind](*args, **kwargs, out_val=result)
            self.forward[self.region] += flops
            self.counts[self.region] += flops * (1 + grads)
        return result


def _is_linear(kind: Any) -> bool:
    return kind not in NOT_LINEAR and "attention" not in str(kind)


@contextlib.contextmanager
def _regions(model: TrainingModel, products: Products) -> Iterator[None]:
    """Sets ``products.region`` while a module runs; nested modules override it, such as the decoder in the model."""
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

    # A LLaVA's encoder and projector are called by the training model, not by the student.
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


def can_count(decoder: nn.Module) -> bool:
    """Whether a pass through the LLM's ``decoder`` can be counted; logs a warning if not.

    Flex attention compiles itself, which fails in a counted pass until about torch 2.14.
    """
    if attention_of(decoder) != "flex_attention" or sees_around_compiled():
        return True
    logger.warning("the log has no 'mfu': with this version of torch, FLOPs cannot be counted under flex_attention")
    return False


def known_peak(device: torch.device) -> float | None:
    """Peak FLOPs per second of the device; None on a CPU, and (with a warning) for a GPU not in ``common.gpus``."""
    peak = peak_of(device)
    if peak is None and device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        logger.warning(f"the log has no 'mfu': the peak FLOPs of '{name}' are not in the table of visper.common.gpus")
    return peak
