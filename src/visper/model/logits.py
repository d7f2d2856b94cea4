"""What a model does to its logits beside its output layer.

Granite and Cohere multiply their logits by a constant, MiniCPM3 its last hidden states. A LLaVA does nothing else than
its output layer, which therefore gets this factor. Gemma 2 and others cap their logits, which no linear layer can do:
they are refused as a LLaVA's LLM. The training loss applies the cap of a complete model (``student.vlm``).

All of this is found by running the model's own code with a decoder and an output layer that return fixed values: no
weight is read, so that models on the meta device, and every process of a sharded run, give the same result.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from visper.common.errors import ConfigError

SCALES = ("logits_scaling", "logit_scale")
"""Names under which configurations hold the factor. Set to 1 once the output layer has it, for programs such as vLLM
that build the LLM of a LLaVA from its own configuration."""
USABLE = "use an LLM whose logits are those of its output layer, such as Llama, Mistral, Phi-3, Qwen, Gemma 3 or SmolLM"


def plain_head(llm: PreTrainedModel) -> Any:
    """The LLM's output layer, changed so that its outputs are the LLM's logits.

    A layer that needs a factor, and shares its weight with the input embeddings, gets a weight of its own. ``llm`` must
    not be used afterwards.

    Raises:
        ConfigError: no linear layer without bias can compute the LLM's logits.
    """
    head: Any = llm.get_output_embeddings()
    factor = _factor(llm)
    if getattr(head, "bias", None) is not None:
        raise ConfigError(
            f"student.llm: the output layer of {type(llm).__name__} has a bias, which LlavaForConditionalGeneration "
            f"lacks: {USABLE}"
        )
    if factor == 1:
        return head
    weight = head.weight.detach().clone().mul_(factor)
    own = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    own.weight = nn.Parameter(weight)
    llm.config.tie_word_embeddings = False
    for name in SCALES:
        if name in llm.config.to_dict():
            setattr(llm.config, name, 1.0)
    return own


def logit_cap(model: Any) -> float | None:
    """The ``final_logit_softcapping`` of an image-text-to-text model; None if it has none or ignores it.

    The training loss calls the output layer directly, for supervised positions only, and needs to know.

    Raises:
        ConfigError: the model does something else to its logits.
    """
    found = _around_head(model, model.model)
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    if _ratio(found.given, found.states) == 1:
        if _ratio(found.logits, found.outputs) == 1:
            return None
        if cap is not None and torch.allclose(found.logits, cap * torch.tanh(found.outputs / cap), rtol=1e-5):
            return float(cap)
    raise ConfigError(
        f"{type(model).__name__} cannot be trained: it does more to its logits than its output layer and "
        "'final_logit_softcapping' do"
    )


def _factor(llm: PreTrainedModel) -> float:
    """What the LLM multiplies its last hidden states and its output layer's outputs by, together."""
    found = _around_head(llm, llm.get_decoder())
    before, after = _ratio(found.given, found.states), _ratio(found.logits, found.outputs)
    if before is None or after is None:
        raise ConfigError(
            f"student.llm: {type(llm).__name__} does more to its logits than multiply them by a constant (such as "
            f"final_logit_softcapping), which LlavaForConditionalGeneration would leave out: {USABLE}"
        )
    return before * after


class _Passed(NamedTuple):
    """Fixed values, and what the model makes of them: ``states`` from the decoder are ``given`` to the output layer,
    whose ``outputs`` become the ``logits``."""

    states: Tensor
    given: Tensor
    outputs: Tensor
    logits: Tensor


def _around_head(model: Any, decoder: Any) -> _Passed:
    # Nine values are exact in bfloat16, to which Mamba casts them. The caller may be building on the meta device.
    states, outputs = (torch.linspace(-end, end, 9, device="cpu").expand(1, 1, 9) for end in (1, 60))
    received: list[Tensor] = []

    def head(given: Tensor) -> Tensor:
        received.append(given.float())
        return outputs.clone()

    def decode(*_: Any, **__: Any) -> _States:
        return _States(last_hidden_state=states.clone())

    try:
        with (
            torch.no_grad(),
            torch.device("cpu"),
            _running(decoder, decode),
            _running(model.get_output_embeddings(), head),
        ):
            logits = model(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False).logits.float()
        (given,) = received
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"cannot find out how {type(model).__name__} computes its logits ({type(error).__name__}: {error}), so "
            f"that others might be trained: {USABLE}"
        ) from error
    return _Passed(states, given, outputs, logits)


def _ratio(found: Tensor, of: Tensor) -> float | None:
    """The constant by which ``of`` was multiplied; None if it was not."""
    if found.shape != of.shape:
        return None
    ratio = float(found.flatten()[-1] / of.flatten()[-1])
    return ratio if torch.allclose(found, ratio * of, rtol=1e-5) else None


class _States(BaseModelOutputWithPast):
    """The output of a decoder of any class: what it has beside the hidden states is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


@contextlib.contextmanager
def _running(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Runs ``forward`` as the module's, inside the block."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
