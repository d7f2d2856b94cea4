"""What each stage trains, and at which learning rate: one table of patterns, applied, counted, and refused where a
pattern matches nothing.

Paper, section 3.3: PT trains the projector, the predictors, the task tokens (query matrices) and the logit scales;
VPT the complete model; IFT the projector and the LLM. Task tokens are frozen after PT.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from visper.common.errors import ConfigError
from visper.config import Optimization, Stage
from visper.model.parts import PLACES, VISION, parameters_of

TRAINABLE: dict[Stage, tuple[str, ...]] = {
    Stage.PT: ("projector.*", "task_tokens.*", "predictors.*", "logit_scales.*"),
    Stage.VPT: ("vision.*", "projector.*", "llm.*"),
    Stage.IFT: ("projector.*", "llm.*"),
}
"""Stage -> patterns over part names."""

DISTILLATION_PARTS = ("predictors.*", "logit_scales.*")
TASK_TOKEN_PARTS = ("task_tokens.*",)
"""What PT lacks without 'distillation' or in a student without task tokens (plain LLaVA pre-training: both), and what
'distillation' adds to the table of another stage: task tokens where a task reads them."""

WORD_PARTS = ("words.*",)
"""What PT trains beside its table where a recipe adds words; in VPT and IFT their embeddings are the LLM's own."""

PARTS: tuple[tuple[str, str], ...] = (
    *((f"student.{start}", part) for start, part in PLACES),
    ("task_tokens.", "task_tokens."),
    ("words.", "words."),
    ("objective.predictors.", "predictors."),
    ("objective.logit_scales.", "logit_scales."),
)
"""Place of a parameter in the training model -> its part name."""

LORA = "lora"
"""The part of low-rank updates, wherever in the LLM they lie; with them the LLM itself is left out of the table."""


@dataclass(frozen=True)
class PartCount:
    """Parameters of one part: how many there are, how many are trainable."""

    part: str
    total: int
    trainable: int


def part_name(parameter: str) -> str:
    """``student.model.language_model.layers.0...`` -> ``llm.layers.0...``."""
    for place, part in PARTS:
        if parameter.startswith(place):
            if ".lora_" in parameter:
                return f"{LORA}.{parameter[len(place) :]}"
            return part + parameter[len(place) :]
    raise ValueError(f"parameter '{parameter}' belongs to no part: add its place to model.parts.PLACES")


def apply_stage(
    model: nn.Module,
    stage: Stage,
    lacks: Iterable[str] = (),
    freeze: Iterable[str] = (),
    adds: Iterable[str] = (),
    train: Iterable[str] = (),
    kept_fixed: Iterable[str] = (),
) -> list[PartCount]:
    """Sets ``requires_grad`` of every parameter by the stage's patterns and returns the counts by part.

    Args:
        lacks: patterns of the table that this run has no use for, by its own settings.
        freeze: parts left out of the table, such as ``["vision"]`` for the published VPT script.
        adds: patterns that this run trains beside the table's, by its own settings.
        train: parts trained beside the table's by the user's wish, such as ``["llm"]`` or ``["llm.layers.0"]``.
        kept_fixed: parameters that stay frozen whatever the patterns say: those of frozen heads.

    Raises:
        ValueError: a pattern, or a part in ``freeze`` or ``train``, matches no parameter.
    """
    names = {name: part_name(name) for name, _ in model.named_parameters()}
    lacking = set(lacks)
    patterns = [p for p in dict.fromkeys((*TRAINABLE[stage], *adds)) if p not in lacking]
    for pattern in patterns:
        if not fnmatch.filter(names.values(), pattern):
            raise ValueError(
                f"stage '{stage}' trains '{pattern}', but the model has no such parameters: "
                "is 'distillation' missing from the run?"
            )
    for part in train:
        if not fnmatch.filter(names.values(), f"{part}.*"):
            valid = ", ".join(dict.fromkeys(name.split(".")[0] for name in names.values()))
            raise ValueError(f"optimization.train names '{part}', which the model does not have: its parts are {valid}")
    patterns += [f"{part}.*" for part in train if f"{part}.*" not in patterns]
    frozen = tuple(freeze)
    for part in frozen:
        if f"{part}.*" not in patterns:
            valid = ", ".join(p.removesuffix(".*") for p in patterns)
            raise ValueError(f"optimization.freeze names '{part}', which stage '{stage}' does not train: use {valid}")
    patterns = [p for p in patterns if p.removesuffix(".*") not in frozen]
    fixed = set(kept_fixed)
    for name, parameter in model.named_parameters():
        trains = name not in fixed and any(fnmatch.fnmatchcase(names[name], p) for p in patterns)
        parameter.requires_grad_(trains)
    return count_parts(model)


def count_parts(model: nn.Module) -> list[PartCount]:
    """Parameters by part, all and trainable. A tied embedding counts once, under the LLM."""
    totals: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        counts = totals.setdefault(part_name(name).split(".")[0], [0, 0])
        counts[0] += parameter.numel()
        counts[1] += parameter.numel() * parameter.requires_grad
    return [PartCount(part, *counts) for part, counts in totals.items()]


def freeze_unused_vision(model: nn.Module, image: Mapping[str, torch.Tensor]) -> list[str]:
    """Freezes encoder parameters that no projected feature depends on, and returns their names.

    The projector reads a hidden layer before the last, so the layers behind it never get a gradient; left trainable
    they break DDP and the resume of a sharded optimizer.

    Args:
        model: has ``get_image_features``.
        image: any image as the model takes it (``Student.blank_image``).
    """
    trainable = {name: p for name, p in parameters_of(model, VISION) if p.requires_grad}
    total = feature_sum(model, image)
    gradients = torch.autograd.grad(total, list(trainable.values()), allow_unused=True)
    unused = [name for (name, _), gradient in zip(trainable.items(), gradients, strict=True) if gradient is None]
    for name in unused:
        trainable[name].requires_grad_(False)
    return unused


def feature_sum(model: Any, image: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The sum of all that the LLM reads of an image, float32: deep features too, where a model has them."""
    output = model.get_image_features(**image)
    deep = getattr(output, "deepstack_features", None) or ()
    features = [*output.pooler_output, *(feature for level in deep for feature in level)]
    return torch.stack([feature.float().sum() for feature in features]).sum()


def check_rates(optimization: Optimization, stage: Stage, model: nn.Module) -> None:
    """Refuses a learning rate for a part that the stage does not train.

    Raises:
        ConfigError: names the part and the trainable ones.
    """
    trainable = [count.part for count in count_parts(model) if count.trainable]
    for part in optimization.lr_overrides:
        if part not in trainable:
            near = difflib.get_close_matches(part, trainable, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"valid here: {', '.join(trainable)}"
            raise ConfigError(
                f"optimization.lr_overrides names '{part}', which this run's stage '{stage}' does not train: {hint}"
            )


def learning_rate_of(optimization: Optimization, part: str) -> float:
    """The peak learning rate of a part."""
    return optimization.lr_overrides.get(part, optimization.lr)


def parameter_groups(optimization: Optimization, model: nn.Module, decayed: set[str]) -> list[dict[str, Any]]:
    """The optimizer's groups: trainable parameters by part, and in each those with weight decay (``decayed``) first.

    Each group carries the name of its ``part``.
    """
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((part_name(name).split(".")[0], name in decayed), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": optimization.weight_decay if decays else 0.0,
            "lr": learning_rate_of(optimization, part),
            "part": part,
        }
        for (part, decays), parameters in sorted(groups.items(), key=lambda item: (item[0][0], not item[0][1]))
    ]
