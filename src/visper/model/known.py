"""Which image-text-to-text models of transformers can be trained: those whose parts and logits are understood."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForImageTextToText, PreTrainedConfig

from visper.common.errors import ConfigError
from visper.model.parts import LLM, PLACES, PROJECTOR, VISION, parameters_of, part_of


def require_known(name: str, config: PreTrainedConfig, trust_remote_code: bool = False) -> None:
    """Refuses a model whose parts are not where ``parts.PLACES`` says; its weights are not needed.

    Raises:
        ConfigError: says what it lacks.
    """
    try:
        with torch.device("meta"):
            model: Any = AutoModelForImageTextToText.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise ConfigError(
            f"'{name}' is a {config.model_type} model, which transformers does not load as an image-text-to-text model"
        ) from error
    lacks = [f"parts for '{part}'" for part in (VISION, PROJECTOR, LLM) if not any(parameters_of(model, part))]
    lacks += [f"a place for '{name}'" for name, _ in model.named_parameters() if part_of(name) is None][:3]
    lacks += [] if hasattr(model.get_decoder(), "layers") else ["decoder layers in get_decoder().layers"]
    lacks += [] if getattr(config, "image_token_id", None) is not None else ["image_token_id in its configuration"]
    if lacks:
        places = ", ".join(start for start, _ in PLACES)
        raise ConfigError(
            f"'{name}' ({config.model_type}) cannot be trained: it has no {'; no '.join(lacks)}. Parts are known "
            f"by the names {places} (visper/model/parts.py)"
        )


PACKABLE = frozenset(("llava", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm"))
"""Model types whose loss is known (tested) to be the same in packed rows. Not Gemma 3: an image's tokens look ahead."""


def require_packable(config: PreTrainedConfig) -> None:
    """Refuses models whose samples may see each other in a packed row.

    Raises:
        ConfigError: this model type has not been tested, or is known to do so.
    """
    if config.model_type not in PACKABLE:
        raise ConfigError(
            f"optimization.packing is not supported by models of type '{config.model_type}', only by "
            f"{', '.join(sorted(PACKABLE))}: set it to false, and data.group_by_length to true"
        )


@torch.no_grad()
def logit_cap(model: Any) -> float | None:
    """The bound of a model's logits (``final_logit_softcapping``); None for one that has none.

    The training loss applies the output layer itself, to supervised positions only. So what the model makes of a hidden
    state is compared with that here: some classes ignore a bound that their configuration names.

    Raises:
        ConfigError: the model does something else to its logits.
    """
    if model.device.type == "meta":
        return None
    ids = torch.tensor([[token for token in range(8) if token != model.config.image_token_id][:3]], device=model.device)
    states = model.model(input_ids=ids).last_hidden_state
    wanted, plain = model(input_ids=ids).logits.float(), model.get_output_embeddings()(states).float()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    for bound in (None, cap):
        if torch.allclose(plain if bound is None else bound * torch.tanh(plain / bound), wanted, rtol=1e-3, atol=1e-3):
            return bound
    raise ConfigError(
        f"{type(model).__name__} does more to its logits than its output layer and 'final_logit_softcapping' do: it "
        "cannot be trained"
    )
