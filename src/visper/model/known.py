"""Checks whether an image-text-to-text model of transformers can be trained: its parts, packing and logits."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForImageTextToText, PreTrainedConfig

from visper.common.errors import ConfigError
from visper.model.parts import LLM, PLACES, PROJECTOR, VISION, parameters_of, part_of


def require_known(name: str, config: PreTrainedConfig, trust_remote_code: bool = False) -> None:
    """Checks, without loading weights, that the model's parts are where ``parts.PLACES`` says.

    Raises:
        ConfigError: they are not; the message says what is missing.
    """
    try:
        with torch.device("meta"):
            model: Any = AutoModelForImageTextToText.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise ConfigError(
            f"'{name}' is a {config.model_type} model, which transformers does not load as an image-text-to-text model"
        ) from error
    lacks = [f"parts for '{part}'" for part in (VISION, PROJECTOR, LLM) if not any(parameters_of(model, part))]
    lacks += [f"known part for '{name}'" for name, _ in model.named_parameters() if part_of(name) is None][:3]
    lacks += [] if hasattr(model.get_decoder(), "layers") else ["decoder layers in get_decoder().layers"]
    lacks += [] if getattr(config, "image_token_id", None) is not None else ["image_token_id in its configuration"]
    if lacks:
        places = ", ".join(start for start, _ in PLACES)
        raise ConfigError(
            f"'{name}' ({config.model_type}) cannot be trained: it has no {'; no '.join(lacks)}. Parts are found "
            f"by the name prefixes {places} (visper/model/parts.py)"
        )


PACKABLE = frozenset(("llava", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm"))
"""Model types whose loss has been tested to be the same in packed rows. Not Gemma 3: its image tokens attend to later
ones."""


def require_packable(config: PreTrainedConfig) -> None:
    """Checks that the samples of a packed row cannot attend to each other.

    Raises:
        ConfigError: they can with this model type, or it has not been tested.
    """
    if config.model_type not in PACKABLE:
        raise ConfigError(
            f"optimization.packing is not supported by models of type '{config.model_type}', only by "
            f"{', '.join(sorted(PACKABLE))}: set it to false, and data.group_by_length to true"
        )


@torch.no_grad()
def logit_cap(model: Any) -> float | None:
    """The model's ``final_logit_softcapping``; None if it has none or ignores it.

    The training loss calls the output layer directly, for supervised positions only. So this function checks that the
    model's own logits equal those of the output layer, with or without the cap: some classes ignore the cap in their
    configuration.

    Raises:
        ConfigError: the model's logits equal neither.
    """
    if model.device.type == "meta":
        return None
    ids = torch.tensor([[token for token in range(8) if token != model.config.image_token_id][:3]], device=model.device)
    states = model.model(input_ids=ids).last_hidden_state
    logits = model(input_ids=ids).logits
    expected, plain = logits.float(), model.get_output_embeddings()(states).float()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    bounded: dict[float | None, torch.Tensor] = {None: plain}
    if cap is not None:
        bounded[cap] = cap * torch.tanh(plain / cap)
    # The closer one: small logits are nearly equal with and without a cap.
    best = min(bounded, key=lambda bound: float((bounded[bound] - expected).abs().max()))
    tolerance = max(1e-3, 8 * torch.finfo(logits.dtype).eps)  # the model bounds them in its own precision
    if torch.allclose(bounded[best], expected, rtol=tolerance, atol=tolerance):
        return best
    raise ConfigError(
        f"{type(model).__name__} cannot be trained: it does more to its logits than its output layer and "
        "'final_logit_softcapping' do"
    )
