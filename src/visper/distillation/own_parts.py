"""Tries a user's own head and losses ("module:name") when the objective is built, before the first step.

A prediction of one channel or of one token would otherwise be compared with the complete target by broadcasting, and
the mean of a loss over images would be divided by their number once more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from visper.config.kinds import HEADS, LOSSES
from visper.distillation.losses import Loss
from visper.distillation.task import DistilledTask

IMAGES, STATES = 2, 3


@torch.no_grad()
def try_own_parts(name: str, task: DistilledTask, head: nn.Module, losses: Mapping[str, Loss], llm_width: int) -> None:
    """Runs the task's own parts on random values.

    Raises:
        ValueError: a part cannot be called so, or its result has the wrong shape.
    """
    tokens, width = task.target.tokens, task.target.width
    if task.head.kind not in HEADS:
        states = _random(IMAGES, STATES, llm_width).to(next((own.device for own in head.parameters()), "cpu"))
        found = _shape(f"task '{name}': head '{task.head.kind}'", head.eval(), states)
        head.train()
        free = set(task.loss) == {"gram"}  # compares predictions of any width
        if len(found) != 3 or found[:2] != (IMAGES, STATES) or not (free or found[2] == width):
            raise ValueError(
                f"task '{name}': head '{task.head.kind}' makes {found} of states {tuple(states.shape)}: expected "
                f"{(IMAGES, STATES, width)}, one embedding of the target's width for each state"
            )
    for kind in (kind for kind in task.loss if kind not in LOSSES):
        pair = _random(IMAGES, tokens, width), _random(IMAGES, tokens, width)
        for mask in (None, torch.ones(IMAGES, tokens, dtype=torch.bool, device="cpu")):
            found = _shape(f"task '{name}': loss '{kind}'", losses[kind], *pair, mask)
            if found != (IMAGES,):
                raise ValueError(
                    f"task '{name}': loss '{kind}' returns shape {found} for {IMAGES} images: return one number for "
                    "each image"
                )


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu")


def _shape(what: str, part: Callable[..., Tensor], *given: Tensor | None) -> tuple[int, ...]:
    try:
        return tuple(part(*given).shape)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{what} cannot be used (docs/extending.md has an example): {error}") from error
