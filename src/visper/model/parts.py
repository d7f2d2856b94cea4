"""The parts (vision, projector, LLM) of transformers' image-text-to-text models, by one table of name prefixes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

VISION, PROJECTOR, LLM = "vision", "projector", "llm"

PLACES: tuple[tuple[str, str], ...] = (
    ("model.vision_tower.", "vision."),
    ("model.vision_model.", "vision."),
    ("model.visual.merger.", "projector."),
    ("model.visual.deepstack_merger_list.", "projector.deepstack."),
    ("model.visual.", "vision."),
    ("model.multi_modal_projector.", "projector."),
    ("model.connector.", "projector."),
    ("model.embed_vision.", "projector."),
    ("model.image_newline", "projector.image_newline"),
    ("model.language_model.", "llm."),
    ("model.text_model.", "llm."),
    ("lm_head.", "llm.lm_head."),
    ("model.audio_tower.", "audio."),
    ("model.embed_audio.", "audio."),
)
"""Prefix of a parameter's name -> prefix of its part name; the first match counts. No stage trains the audio part. To
support other names, add lines here."""


def part_of(parameter: str) -> str | None:
    """The part that a parameter belongs to, by its name in the model; None if no prefix in ``PLACES`` matches."""
    return next((own.split(".")[0] for start, own in PLACES if parameter.startswith(start)), None)


def parameters_of(model: nn.Module, part: str) -> Iterator[tuple[str, nn.Parameter]]:
    """The named parameters of one part of a model."""
    return ((name, parameter) for name, parameter in model.named_parameters() if part_of(name) == part)


def modules_of(model: nn.Module, part: str) -> list[str]:
    """The names of the modules that make up one part of a model, without the output layer."""
    starts = [start.removesuffix(".") for start, own in PLACES if own.startswith(f"{part}.") and start != "lm_head."]
    existing = {name for name, _ in model.named_modules()}
    return [start for start in starts if start in existing]


class Encoded(NamedTuple):
    """A module whose input is the encoder's features in the order of the image tokens, and the width per token.

    Several consecutive rows of the input may belong to one token (Qwen merges squares of patches); ``width`` is then
    that of all its rows together.
    """

    module: str
    width: Callable[[Any], int]


_LINEAR = Encoded("model.multi_modal_projector", lambda module: int(module.linear_1.in_features))
_MERGER = Encoded("model.visual.merger", lambda module: int(module.hidden_size))
ENCODED: Mapping[str, Encoded] = {
    "llava": _LINEAR,
    "internvl": _LINEAR,
    "smolvlm": Encoded("model.connector.modality_projection", lambda module: int(module.proj.in_features)),
    "gemma3": Encoded("model.multi_modal_projector.mm_soft_emb_norm", lambda module: len(module.weight)),
    "gemma4": Encoded("model.embed_vision", lambda module: int(module.embedding_projection.in_features)),
    "qwen3_vl": _MERGER,
    "qwen3_5": _MERGER,
}
"""Model type -> the module that reads encoder features in the order of the image tokens. LLaVA-OneVision, Qwen2.5-VL
and Mistral 3 have none: the first drops, adds and merges tokens after its projector, Qwen2.5-VL reorders them by
windows before it, Mistral 3 in it."""
