"""Where transformers' image-text-to-text models keep their parts: one table, for every model that can be trained."""

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
    ("model.image_newline", "projector.image_newline"),
    ("model.language_model.", "llm."),
    ("model.text_model.", "llm."),
    ("lm_head.", "llm.lm_head."),
)
"""Start of a parameter's name -> start of its part name; the first that fits counts. A family of models whose names are
not here takes one line."""


def part_of(parameter: str) -> str | None:
    """The part that a parameter belongs to, by its name in the model; None: its place is not known."""
    return next((own.split(".")[0] for start, own in PLACES if parameter.startswith(start)), None)


def parameters_of(model: nn.Module, part: str) -> Iterator[tuple[str, nn.Parameter]]:
    """The named parameters of one part of a model."""
    return ((name, parameter) for name, parameter in model.named_parameters() if part_of(name) == part)


def modules_of(model: nn.Module, part: str) -> list[str]:
    """The names of the modules that make up one part of a model, without its output layer."""
    starts = [start.removesuffix(".") for start, own in PLACES if own.startswith(f"{part}.") and start != "lm_head."]
    there = {name for name, _ in model.named_modules()}
    return [start for start in starts if start in there]


class Encoded(NamedTuple):
    """The module that is given what the encoder makes of each image token, in their order, and its width.

    Consecutive rows of the input may belong to one token (Qwen's squares of patches); ``width`` is theirs together.
    """

    module: str
    width: Callable[[Any], int]


_LINEAR = Encoded("model.multi_modal_projector", lambda module: int(module.linear_1.in_features))
ENCODED: Mapping[str, Encoded] = {
    "llava": _LINEAR,
    "internvl": _LINEAR,
    "smolvlm": Encoded("model.connector.modality_projection", lambda module: int(module.proj.in_features)),
    "gemma3": Encoded("model.multi_modal_projector.mm_soft_emb_norm", lambda module: len(module.weight)),
    "qwen3_vl": Encoded("model.visual.merger", lambda module: int(module.hidden_size)),
}
"""Model type -> where its encoder's features stand in the order of its image tokens. Not here: LLaVA-OneVision, which
drops, adds and merges tokens behind its projector, and Qwen2.5-VL, which sorts them by windows before."""
