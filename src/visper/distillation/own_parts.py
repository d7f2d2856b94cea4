"""Tries a user's own head and losses ("module:name") when the objective is built, before the first step.

A prediction of one channel or of one token would otherwise be compared with the complete target by broadcasting, the
mean of a loss over images would be divided by their number once more, and one without gradient would teach nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn

from visper.config.kinds import HEADS, LOSSES
from visper.distillation.losses import Loss
from visper.distillation.task import DistilledTask

IMAGES, STATES = 2, 3


@torch.enable_grad()
def try_own_parts(
    name: str,
    task: DistilledTask,
    head: nn.Module,
    losses: Mapping[str, Loss],
    llm_width: int,
    counts: Collection[int] = (),
) -> set[str]:
    """Runs the task's own parts on random values. A head whose weights are on the meta device is not tried.

    Args:
        counts: the numbers of states that heads get, if they are known.

    Returns:
        The own losses that ignore their mask, which is right only where every token counts.

    Raises:
        ValueError: a part cannot be called so, or its result has the wrong shape or no gradient.
    """
    with torch.device("cpu"):  # also where models are built on the meta device, without values
        predicted = _width(name, task, head, llm_width, counts) or task.target.width
        own = [kind for kind in task.loss if kind not in LOSSES]
        return {k for k in own if not _reads_mask(f"task '{name}': loss '{k}'", losses[k], task, predicted)}


def _reads_mask(what: str, loss: Loss, task: DistilledTask, predicted: int) -> bool:
    tokens, width = task.target.tokens, task.target.width
    values, target = _random(IMAGES, tokens, predicted), _random(IMAGES, tokens, width, seed=1)
    mask = torch.arange(tokens).expand(IMAGES, -1) >= (tokens > 1)  # all but the first token, if there are others
    others = values.where(mask[..., None], 10.0)
    found = [
        _made(what, loss, *given) for given in ((values, target, None), (values, target, mask), (others, target, mask))
    ]
    for made in found:
        if made.shape != (IMAGES,):
            shape = tuple(made.shape)
            raise ValueError(f"{what} returns shape {shape} for {IMAGES} images: return one number for each image")
    return torch.allclose(found[1], found[2], equal_nan=True)


def _width(name: str, task: DistilledTask, head: nn.Module, llm_width: int, counts: Collection[int]) -> int | None:
    """The width of an own head's predictions; None if it may accept only numbers of states that are not known.

    Its number of states depends on the student, and it may have a parameter or a grid for each.
    """
    failed: ValueError | None = None
    devices = [own.device for own in (*head.parameters(), *head.buffers())] or [torch.device("cpu")]
    if task.head.kind in HEADS or torch.device("meta") in devices:
        return None
    what, width = f"task '{name}': head '{task.head.kind}'", task.target.width
    for states in (STATES, task.target.tokens, *counts):
        given = _random(IMAGES, states, llm_width).to(devices[0])
        try:
            with devices[0]:
                found = tuple(_made(what, head.eval(), given).shape)
        except ValueError as error:
            if isinstance(error.__cause__, (IndexError, RuntimeError)):
                failed = error
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
    if failed is not None and counts:
        raise failed
    return None


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _made(what: str, part: Callable[..., Tensor], first: Tensor, *more: Tensor | None) -> Tensor:
    try:
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(0)  # a loss may sample, each time the same
            made = part(first.clone().requires_grad_().clone(), *more)
        _, learns = made.shape, made.requires_grad
    except (AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{what} cannot be used (docs/extending.md has an example): {type(error).__name__}: {error}"
        ) from error
    if not learns:
        raise ValueError(f"{what} gives a result without gradient, so that nothing would be learned: do not detach it")
    return made
