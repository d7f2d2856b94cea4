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
    """Runs the task's own parts on random values. A head whose weights are on the meta device is not tried.

    Raises:
        ValueError: a part cannot be called so, or its result has the wrong shape.
    """
    with torch.device("cpu"):  # also where models are built on the meta device, without values
        predicted = _width(name, task, head, llm_width) or task.target.width
        for kind in (kind for kind in task.loss if kind not in LOSSES):
            _try_loss(f"task '{name}': loss '{kind}'", losses[kind], task, predicted)


def _try_loss(what: str, loss: Loss, task: DistilledTask, predicted: int) -> None:
    tokens, width = task.target.tokens, task.target.width
    pair = _random(IMAGES, tokens, predicted), _random(IMAGES, tokens, width)
    for mask in (None, torch.ones(IMAGES, tokens, dtype=torch.bool)):
        found = _shape(what, loss, *pair, mask)
        if found != (IMAGES,):
            raise ValueError(f"{what} returns shape {found} for {IMAGES} images: return one number for each image")


def _width(name: str, task: DistilledTask, head: nn.Module, llm_width: int) -> int | None:
    """The width of an own head's predictions; None if it accepts neither a few states nor the target's number.

    Its number of states depends on the student, and it may have a parameter or a grid for each.
    """
    if task.head.kind in HEADS or any(own.is_meta for own in (*head.parameters(), *head.buffers())):
        return None
    what, width = f"task '{name}': head '{task.head.kind}'", task.target.width
    for states in (STATES, task.target.tokens):
        given = _random(IMAGES, states, llm_width)
        try:
            found = _shape(what, head.eval(), given)
        except ValueError as error:
            if isinstance(error.__cause__, (IndexError, RuntimeError)):
                continue
            raise
        finally:
            head.train()
        # Gram and own losses may compare embeddings of different widths, but an own one may repeat a single channel.
        others = set(task.loss) - {"gram"}
        fixed = bool(others & LOSSES.keys()) or (bool(others) and found[-1:] == (1,))
        if len(found) != 3 or found[:2] != (IMAGES, states) or (fixed and found[2] != width):
            raise ValueError(
                f"{what} makes {found} of states {tuple(given.shape)}: expected {(IMAGES, states, width)}, one "
                "embedding of the target's width for each state"
            )
        return found[2]
    return None


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _shape(what: str, part: Callable[..., Tensor], *given: Tensor | None) -> tuple[int, ...]:
    try:
        return tuple(part(*given).shape)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{what} cannot be used (docs/extending.md has an example): {error}") from error
