"""A task of the distillation objective, and the check that it fits the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, NonNegativeFloat, PositiveFloat
from pydantic.dataclasses import dataclass
from torch import nn

from visper.config import PUBLISHED_LOSS, Head, Position
from visper.config import Task as TaskConfig
from visper.config.kinds import check_losses, check_task_name
from visper.distillation.heads import check_head_fits, query_source
from visper.distillation.teachers.base import TargetSpec

CONTRASTIVE = "info_nce"
"""The only loss that compares with the targets of the whole global batch; its logit scale is trainable."""
PROJECTED = 0
"""Layer number of the decoder's input, which at image tokens is the projector's output."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class DistilledTask:
    """A task of the objective. Attributes not listed here are those of ``config.Task``; values are as in a recipe.

    Attributes:
        target: shape of the target.
        layers: decoder layers, counted from 1; empty at the projector.
        own: the student's module whose features are the target, "encoder" or "projector"; None: a teacher's target.
        end: share of the steps after which the weight has fallen to zero; None: the weight is constant.

    Raises:
        ValueError: an attribute is unknown, or has a value that a recipe could not have.
    """

    target: TargetSpec
    layers: tuple[int, ...] = ()
    head: Head = field(default_factory=lambda: Head.model_validate({}))
    weight: NonNegativeFloat = 0.5
    at: Position = Position.TASK_TOKENS
    loss: Mapping[str, PositiveFloat] = field(default_factory=lambda: dict(PUBLISHED_LOSS))
    own: Literal["encoder", "projector"] | None = None
    end: Annotated[float, Field(gt=0, le=1)] | None = None

    @classmethod
    def of(cls, config: TaskConfig, target: TargetSpec) -> DistilledTask:
        """The task of a recipe, with a target of the given shape."""
        own: Any = config.target.kind if config.target.own else None  # a key of OWN_TARGETS
        end = None if config.schedule is None else config.schedule.end
        return cls(target, config.layers, config.head, config.weight, config.at, config.loss, own, end)

    @property
    def tapped(self) -> tuple[int, ...]:
        """The layers whose states the task reads; ``PROJECTED`` at the projector."""
        return (PROJECTED,) if self.at is Position.PROJECTOR else self.layers

    @property
    def by_place(self) -> bool:
        """Whether a teacher's target is mapped onto the image tokens."""
        return self.own is None and self.head.kind != "resampler" and self.at is not Position.TASK_TOKENS

    @property
    def needs_matrix(self) -> bool:
        """Whether the heads take their queries from the task's query matrix, which is not part of them."""
        resamples = self.head.kind == "resampler" and self.at is Position.TASK_TOKENS
        return resamples and query_source(self.head, self.target) == "matrix"

    def head_name(self, name: str, layer: int) -> str:
        """Key in ``predictors`` of a layer's head; ``name`` is the task's."""
        return f"{name}_{'shared' if self.head.shared else layer}"

    def head_names(self, name: str) -> list[str]:
        """Keys in ``predictors`` of all heads of the task."""
        return list(dict.fromkeys(self.head_name(name, layer) for layer in self.tapped))

    def weight_at(self, progress: float) -> float:
        """The task's weight when the share ``progress`` of the steps is done."""
        return self.weight if self.end is None else self.weight * max(0.0, 1.0 - progress / self.end)


def check_task(name: str, task: DistilledTask, llm_width: int, llm_layers: int) -> None:
    """Raises ValueError if the model lacks a tapped layer or the head cannot predict the target."""
    check_task_name(name)
    check_losses(task.loss)
    if hasattr(nn.ParameterDict, name):
        raise ValueError(f"task '{name}': torch modules reserve this name: choose another, such as '{name}_task'")
    if not task.tapped or not task.loss:
        raise ValueError(f"task '{name}' has no {'loss' if task.tapped else 'layers'}: it would train nothing")
    beyond = [layer for layer in task.layers if not 1 <= layer <= llm_layers]
    if beyond or len(set(task.layers)) != len(task.layers):
        raise ValueError(
            f"task '{name}' taps layers {list(task.layers)}, but the model has layers 1 to {llm_layers}, and each may "
            f"be tapped only once: change 'distillation.tasks.{name}.layers'"
        )
    check_head_fits(name, task.head, task.target, task.at, losses=task.loss)
    directions = [kind for kind in ("cosine", "gram") if kind in task.loss]
    if task.target.width == 1 and directions:
        raise ValueError(
            f"task '{name}': loss '{directions[0]}' compares directions, but a target of one channel has none: "
            f"set 'distillation.tasks.{name}.loss' to smooth_l1 or mse"
        )
    if task.head.kind == "none" and task.target.width != llm_width and set(task.loss) != {"gram"}:
        raise ValueError(
            f"task '{name}': head 'none' compares states of width {llm_width} with a target of width "
            f"{task.target.width}, which only the loss gram supports: set head.kind to linear"
        )
