"""A learning rate for each part of the stage's table, or one for all."""

from __future__ import annotations

import difflib
from typing import Any

from torch import nn

from visper.common.errors import ConfigError
from visper.config import Run
from visper.training.stages import count_parts, part_name


def check_rates(run: Run, model: nn.Module) -> None:
    """Refuses a rate for a part that this stage does not train.

    Raises:
        ConfigError: names the part and those that learn.
    """
    learning = [count.part for count in count_parts(model) if count.trainable]
    for part in run.optimization.lr_overrides:
        if part not in learning:
            near = difflib.get_close_matches(part, learning, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"valid here: {', '.join(learning)}"
            raise ConfigError(
                f"optimization.lr_overrides names '{part}', which this run's stage '{run.stage}' does not train: {hint}"
            )


def learning_rate_of(run: Run, part: str) -> float:
    """The peak rate of a part."""
    return run.optimization.lr_overrides.get(part, run.optimization.lr)


def parameter_groups(run: Run, model: nn.Module, decayed: set[str]) -> list[dict[str, Any]]:
    """The optimizer's groups: learning parameters by part, and in each those with weight decay (``decayed``) first.

    Each group carries the name of its ``part``.
    """
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((part_name(name).split(".")[0], name in decayed), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": run.optimization.weight_decay if decays else 0.0,
            "lr": learning_rate_of(run, part),
            "part": part,
        }
        for (part, decays), parameters in sorted(groups.items(), key=lambda item: (item[0][0], not item[0][1]))
    ]
