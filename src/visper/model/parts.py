"""Where transformers' image-text-to-text models keep their parts: one table, for every model that can be trained."""

from __future__ import annotations

from collections.abc import Iterator

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
