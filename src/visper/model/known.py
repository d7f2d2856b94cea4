"""Checks whether an image-text-to-text model of transformers can be trained: its parts, and packing."""

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


PACKABLE = frozenset(("llava", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm", "mistral3"))
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
