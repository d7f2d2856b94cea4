"""The trainable parameters of each stage, as a table of patterns, and their learning rates.

Paper, section 3.3: PT trains the projector, the predictors, the task tokens (query matrices) and the logit scales;
VPT the complete model; IFT the projector and the LLM. Task tokens are frozen after PT.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from visper.common.errors import ConfigError
from visper.config import Optimization, Position, Stage
from visper.config.kinds import nearest
from visper.model.parts import PLACES, VISION, parameters_of

TRAINABLE: dict[Stage, tuple[str, ...]] = {
    Stage.PT: ("projector.*", "task_tokens.*", "predictors.*", "logit_scales.*"),
    Stage.VPT: ("vision.*", "projector.*", "llm.*"),
    Stage.IFT: ("projector.*", "llm.*"),
}
"""Stage -> patterns over part names."""

DISTILLATION_PARTS = ("predictors.*", "logit_scales.*")
TASK_TOKEN_PARTS = ("task_tokens.*",)
"""Patterns that do not apply without 'distillation' or without task tokens (plain LLaVA pre-training has neither), and
that 'distillation' adds to the other stages: task tokens only if a task reads them."""

WORD_PARTS = ("words.*",)
"""Added to PT's patterns if a recipe adds words; in VPT and IFT, added words are part of the LLM's embeddings."""

PARTS: tuple[tuple[str, str], ...] = (
    *((f"student.{start}", part) for start, part in PLACES),
    ("task_tokens.", "task_tokens."),
    ("words.", "words."),
    ("objective.predictors.", "predictors."),
    ("objective.logit_scales.", "logit_scales."),
)
"""Prefix of a parameter's name in the training model -> prefix of its part name."""

LORA = "lora"
"""Part name of the low-rank updates of the LLM; with them, the LLM itself is removed from the table."""


BEFORE_STATES: dict[Position, tuple[str, ...]] = {
    Position.PROJECTOR: ("vision", "projector"),
    Position.IMAGE_TOKENS: ("vision", "projector", "llm", LORA),
    Position.TASK_TOKENS: ("vision", "projector", "llm", LORA, "task_tokens"),
    Position.SEQUENCE: ("vision", "projector", "llm", LORA, "task_tokens", "words"),
}
"""Position that a task reads -> parts that its hidden states depend on. Task tokens come after the image."""


@dataclass(frozen=True)
class PartCount:
    """Number of parameters of one part, and how many of them are trainable."""

    part: str
    total: int
    trainable: int


def part_name(parameter: str) -> str:
    """The part name of a parameter, such as ``llm.layers.0...`` for ``student.model.language_model.layers.0...``."""
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
        lacks: patterns of the table that do not apply to this run.
        freeze: parts to remove from the table (``optimization.freeze``), such as ``["vision"]`` for the published VPT
            script.
        adds: additional patterns that follow from the run's settings.
        train: additional parts to train (``optimization.train``), such as ``["llm"]`` or ``["llm.layers.0"]``.
        kept_fixed: parameters that stay frozen whatever the patterns say, those of frozen heads.

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
    """Total and trainable parameters by part. A tied embedding counts once, under the LLM."""
    totals: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        counts = totals.setdefault(part_name(name).split(".")[0], [0, 0])
        counts[0] += parameter.numel()
        counts[1] += parameter.numel() * parameter.requires_grad
    return [PartCount(part, *counts) for part, counts in totals.items()]


def tasks_without_influence(model: nn.Module, tasks: Mapping[str, Position]) -> list[str]:
    """The tasks that train nothing but their heads, because everything before the states that they read is frozen.

    None in a run that trains only heads, as a probe does.
    """
    trained = {count.part for count in count_parts(model) if count.trainable}
    if trained <= {pattern.removesuffix(".*") for pattern in DISTILLATION_PARTS}:
        return []
    return [name for name, at in tasks.items() if trained.isdisjoint(BEFORE_STATES[at])]


def freeze_unused_vision(model: nn.Module, image: Mapping[str, torch.Tensor]) -> list[str]:
    """Freezes encoder parameters that the projected features do not depend on, and returns their names.

    The projector may read a layer before the last, so later layers never get a gradient. If they stayed trainable, DDP
    would fail, and so would resuming a sharded optimizer. ``image``: the model's inputs for any image.
    """
    trainable = {name: p for name, p in parameters_of(model, VISION) if p.requires_grad}
    total = feature_sum(model, image)
    gradients = torch.autograd.grad(total, list(trainable.values()), allow_unused=True)
    unused = [name for (name, _), gradient in zip(trainable.items(), gradients, strict=True) if gradient is None]
    for name in unused:
        trainable[name].requires_grad_(False)
    return unused


def feature_sum(model: Any, image: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The sum, in float32, of all image features that the LLM reads, including deepstack features if there are any."""
    output = model.get_image_features(**image)
    deep = getattr(output, "deepstack_features", None) or ()
    features = [*output.pooler_output, *(feature for level in deep for feature in level)]
    return torch.stack([feature.float().sum() for feature in features]).sum()


def check_rates(optimization: Optimization, stage: Stage, model: nn.Module) -> None:
    """Checks that ``lr_overrides`` names only parts that the stage trains.

    Raises:
        ConfigError: it names another one; the message lists the trainable parts.
    """
    trainable = [count.part for count in count_parts(model) if count.trainable]
    for part in optimization.lr_overrides:
        if part not in trainable:
            raise ConfigError(
                f"optimization.lr_overrides names '{part}', which this run's stage '{stage}' does not train: "
                + nearest(part, trainable)
            )


def learning_rate_of(optimization: Optimization, part: str) -> float:
    """The peak learning rate of a part."""
    return optimization.lr_overrides.get(part, optimization.lr)


def decayed_names(names: Iterable[str]) -> list[str]:
    """Names of parameters that the Trainer would decay, without the logit scales.

    A logit scale is the logarithm of a factor on cosines, so decay would pull the factor to 1, whatever the loss needs.
    The Trainer leaves out biases and norms, by name, but knows no temperatures. Query matrices are decayed because the
    Trainer decays embeddings, and that is what they are: their means are the task tokens' rows of the vocabulary.
    """
    return [name for name in names if "logit_scales" not in name.split(".")]


def parameter_groups(optimization: Optimization, model: nn.Module, decayed: set[str]) -> list[dict[str, Any]]:
    """The optimizer's parameter groups, one or two per part: with weight decay (names in ``decayed``), then without.

    Each group has the name of its ``part`` as an extra key.
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
