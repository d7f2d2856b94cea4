"""The section 'distillation': for each task its target, its position in the student, its head and its losses."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator, model_validator

from visper.config.kinds import (
    OWN_TARGETS,
    TEACHERS,
    TaskName,
    check_head,
    check_losses,
    check_options,
    class_place,
)
from visper.config.paths import PathText
from visper.config.section import Choice, Section, WithoutNulls, without_nulls

PUBLISHED_LOSS = {"smooth_l1": 1.0, "info_nce": 0.3}
"""The default losses of a task and their weights (paper, section 3)."""


class Target(Section):
    """The embedding to predict: from a frozen teacher, or from the student's own encoder or projector.

    Further keys are options of the kind.
    """

    kind: str = Field(description="a key of TEACHERS, module:Class of your own teacher, or encoder or projector")
    model: PathText | None = Field(
        None, description="the teacher's hub id, folder or file; another one is never used instead"
    )
    revision: str | None = Field(None, description="commit, tag or branch of a hub id; default: its main branch")

    model_config = ConfigDict(extra="allow", frozen=True)

    @property
    def own(self) -> bool:
        """Whether the target comes from the student itself, without a teacher."""
        return self.kind in OWN_TARGETS

    @property
    def place(self) -> str:
        """The teacher's ``model``."""
        assert self.model is not None, "a target from the student itself has no model"
        return self.model

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments for this kind of teacher; null restores the default."""
        return without_nulls({**(self.model_extra or {}), "revision": self.revision})

    @model_validator(mode="after")
    def _known(self) -> Target:
        if self.own:
            given = [name for name in ("model", *self.options) if name != "model" or self.model is not None]
            if given:
                raise ValueError(f"target '{self.kind}' comes from the student itself: remove '{given[0]}'")
            return self
        class_place(self.kind)
        if self.model is None:
            raise ValueError(f"target '{self.kind}' needs 'model': a hub id, folder or file")
        if self.kind in TEACHERS:
            check_options(f"teacher kind '{self.kind}'", self.options, TEACHERS[self.kind].options)
        return self


class Head(Section):
    """Predicts embeddings from hidden states. Further keys are options of the kind, see HEADS.

    Options of "resampler", the published head (a Perceiver resampler, optionally followed by an MLP):
        queries: "matrix" (the task's query matrix) or "states" (mean of the layer's hidden states at the task's tokens;
            at the image's in a model without task tokens). Default: "states" for one-token targets, else "matrix".
        inner: width inside the resampler: the LLM's, or the target's (default).
        mlp: adds a Linear-ReLU-Linear after the resampler.
        num_queries: rows of the query matrix, at task tokens only; default: the target's tokens ("states": the number
            of task tokens).
        depth, heads, head_width, ff_mult: layers, attention heads, width per head, feed-forward multiple.
    Options of "mlp": depth (number of linear layers), width (between them), activation.
    """

    kind: str = Field("resampler", description="a key of HEADS, or module:Class of your own class")
    shared: bool = Field(False, description="one head for all layers of the task")
    frozen: bool = Field(False, description="keep its initial weights")

    model_config = ConfigDict(extra="allow", frozen=True)

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments for this kind of head; null restores the default."""
        return without_nulls(self.model_extra or {})

    @model_validator(mode="after")
    def _known(self) -> Head:
        check_head(self.kind, self.options)
        return self


class Schedule(Section):
    """A schedule for a task's weight: it falls linearly to zero at ``end`` and stays there."""

    end: float = Field(gt=0, le=1, description="share of the steps")


class Position(Choice):
    """The positions at which a task reads hidden states."""

    TASK_TOKENS = "task_tokens"
    IMAGE_TOKENS = "image_tokens"
    PROJECTOR = "projector"
    SEQUENCE = "sequence"


class Task(Section):
    """One distilled task: target, position, head and losses."""

    target: Target
    at: Position = Field(Position.TASK_TOKENS, description="positions whose states are read")
    layers: tuple[PositiveInt, ...] = Field((), description="decoder layers tapped, counted from 1; none at projector")
    head: Head = Field(default_factory=lambda: Head.model_validate({}))
    loss: Annotated[dict[str, PositiveFloat], WithoutNulls] = Field(
        default_factory=lambda: dict(PUBLISHED_LOSS), min_length=1, description="key of LOSSES -> its weight"
    )
    weight: NonNegativeFloat = 0.5
    schedule: Schedule | None = None

    @field_validator("loss")
    @classmethod
    def _known_losses(cls, loss: dict[str, float]) -> dict[str, float]:
        check_losses(loss)
        return loss

    @model_validator(mode="after")
    def _parts_fit(self) -> Task:
        if (self.at is Position.PROJECTOR) == bool(self.layers):
            wrong = "has no layers: remove 'layers'" if self.layers else "needs 'layers', such as [8, 20]"
            raise ValueError(f"at '{self.at}' {wrong}")
        if self.at is Position.SEQUENCE and self.head.kind != "resampler":
            raise ValueError(
                f"at 'sequence' a head must read several states, '{self.head.kind}' reads one: set head.kind to "
                "resampler"
            )
        if self.target.own:
            self._own_target_fits()
        return self

    def _own_target_fits(self) -> None:
        kind, head = self.target.kind, self.head.kind
        if self.at in (Position.TASK_TOKENS, Position.SEQUENCE):
            raise ValueError(f"target '{kind}' has one embedding per image token: set 'at' to image_tokens")
        if self.at is Position.PROJECTOR and kind == "projector":
            raise ValueError("target 'projector' at 'projector' predicts itself: set 'at' to image_tokens")
        if head == "resampler":
            raise ValueError(f"target '{kind}' is predicted token by token: set head.kind to mlp, linear or none")
        if "info_nce" in self.loss:
            raise ValueError(
                "info_nce needs the targets of the global batch, which are not available for target "
                f"'{kind}': set 'loss' without it, for example {{cosine: 1.0}}"
            )


class Distillation(Section):
    """The embedding losses, summed over tasks and layers: task weight x (weighted sum of the task's losses)."""

    tasks: Annotated[dict[TaskName, Task], WithoutNulls] = Field(min_length=1)
    init_logit_scale: float = 2.0
    text_keys: bool = Field(True, description="resamplers at task tokens also read the text's hidden states")
    teacher_dtype: Literal["float32", "bfloat16", "float16"] | None = Field(None, description="default: the run's")
    targets: PathText | None = Field(
        None, description="stored targets, written by `visper targets build`; no teacher is loaded"
    )

    @property
    def taught(self) -> dict[str, Task]:
        """The tasks that have a teacher."""
        return {name: task for name, task in self.tasks.items() if not task.target.own}

    @property
    def at_task_tokens(self) -> list[str]:
        """The tasks that read task tokens."""
        return [name for name, task in self.tasks.items() if task.at is Position.TASK_TOKENS]
