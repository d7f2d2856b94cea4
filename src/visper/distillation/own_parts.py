"""Tries a user's own head and losses ("module:name") when the objective is built, before the first step.

A prediction of one channel or of one token would otherwise be compared with the complete target by broadcasting, the
mean of a loss over images would be divided by their number once more, one without gradient would teach nothing, and
one that mixes images would depend on how the batch is split.
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
        The own parts that need every token: losses that ignore their mask, and a head that reads several states, since
        it cannot know which are padding.

    Raises:
        ValueError: a part cannot be called so, its result has the wrong shape or no gradient, or it mixes images.
    """
    with torch.device("cpu"):  # also where models are built on the meta device, without values
        width, mixes = _tried_head(name, task, head, llm_width, counts)
        predicted, own = width or task.target.width, [kind for kind in task.loss if kind not in LOSSES]
        ignoring = {k for k in own if not _reads_mask(f"task '{name}': loss '{k}'", losses[k], task, predicted)}
        return ignoring | ({task.head.kind} if mixes else set())


def _reads_mask(what: str, loss: Loss, task: DistilledTask, predicted: int) -> bool:
    tokens, width = task.target.tokens, task.target.width
    values, target = _random(IMAGES, tokens, predicted), _random(IMAGES, tokens, width, seed=1)
    mask = torch.arange(tokens).expand(IMAGES, -1) >= (tokens > 1)  # all but the first token, if there are others
    others = values.where(mask[..., None], 10.0)
    right, twice = (values, target, mask), (values[[0, 0]], target[[0, 0]], mask)
    given = (values, target, None), right, right, (others, target, mask), twice
    found = [_made(what, loss, *one) for one in given]
    for made in found:
        if made.shape != (IMAGES,):
            shape = tuple(made.shape)
            raise ValueError(f"{what} returns shape {shape} for {IMAGES} images: return one number for each image")
    _, masked, again, elsewhere, beside_itself = found
    if _close(masked, again) and not _close(masked[0], beside_itself[0]):  # one that samples differs each time
        raise ValueError(
            f"{what} gives an image another number beside other images, so that it would depend on how the batch is "
            "split: compare only embeddings of the same image; info_nce compares images, over the global batch"
        )
    return torch.allclose(masked, elsewhere, equal_nan=True)


def _tried_head(
    name: str, task: DistilledTask, head: nn.Module, llm_width: int, counts: Collection[int]
) -> tuple[int | None, bool]:
    """The width of an own head's predictions, and whether one of them reads several states.

    The width is None if the head may accept only numbers of states that are not known: their number depends on the
    student, and the head may have a parameter or a grid for each.
    """
    failed: ValueError | None = None
    devices = [own.device for own in (*head.parameters(), *head.buffers())] or [torch.device("cpu")]
    if task.head.kind in HEADS or torch.device("meta") in devices:
        return None, False
    what, width = f"task '{name}': head '{task.head.kind}'", task.target.width
    for states in (STATES, task.target.tokens, *counts):
        given = _random(IMAGES, states, llm_width)
        last_changed = torch.cat((given[:, :-1], _random(IMAGES, 1, llm_width, seed=2)), 1)
        tries = [one.to(devices[0]) for one in (given, given[[0, 0]], last_changed)]
        try:
            with devices[0]:
                made, twice, changed = (_made(what, head.eval(), one) for one in tries)
        except ValueError as error:
            if isinstance(error.__cause__, (IndexError, RuntimeError)):
                failed = error
                continue
            raise
        finally:
            head.train()
        found = tuple(made.shape)
        # Gram and own losses may compare embeddings of different widths, but an own one may repeat a single channel.
        others = set(task.loss) - {"gram"}
        fixed = bool(others & LOSSES.keys()) or (bool(others) and found[-1:] == (1,))
        if len(found) != 3 or found[:2] != (IMAGES, states) or (fixed and found[2] != width):
            raise ValueError(
                f"{what} makes {found} of states {tuple(given.shape)}: expected {(IMAGES, states, width)}, one "
                "embedding of the target's width for each state"
            )
        if not _close(made[0], twice[0]):
            raise ValueError(
                f"{what} reads the states of other images: they have the shape images x states x channels, for which "
                "torch's attention needs batch_first=True"
            )
        return found[2], not _close(made[:, :-1], changed[:, :-1])
    if failed is not None and counts:
        raise failed
    return None, False


def _close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-6, equal_nan=True)


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
