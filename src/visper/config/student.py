"""The student of a first stage: assembled from parts, or a complete model from transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Discriminator, Field, PositiveInt, Tag, field_validator, model_validator

from visper.config.kinds import TaskName
from visper.config.paths import PathText, read_words
from visper.config.section import Section, without_nulls


class TaskTokenLayout(Section):
    """The task tokens that follow the image tokens, in every stage and at inference (paper, section 3)."""

    order: tuple[TaskName, ...] = ("depth", "seg", "gen")
    per_task: PositiveInt = 8

    @model_validator(mode="after")
    def _names_once(self) -> TaskTokenLayout:
        if len(set(self.order)) != len(self.order):
            raise ValueError(f"a task occurs twice in order {list(self.order)}: name each task once")
        return self


class Student(Section):
    """The parts from which a first stage assembles the student; a later stage starts from a folder instead."""

    llm: PathText = Field(description="causal LLM: hub id or folder")
    llm_revision: str | None = Field(None, description="commit, tag or branch of a hub id; default: its main branch")
    encoder: PathText = Field(description="image encoder: hub id or folder")
    encoder_revision: str | None = Field(None, description="the same for the encoder")
    feature_layer: int = Field(-2, description="encoder layer that the projector reads, from 1; negative: from the end")
    image_size: PositiveInt | None = Field(None, description="side length in pixels; default: the encoder's own")
    system_prompt: str | None = Field(None, description="used if a conversation has no system turn")
    task_tokens: TaskTokenLayout | None = Field(TaskTokenLayout(), description="null: a plain LLaVA student")
    add_words: tuple[str, ...] = Field(
        default=(), description="words to add as tokens: a list, or a text file with one word per line"
    )
    trust_remote_code: bool = False

    @field_validator("add_words", mode="before")
    @classmethod
    def _read_words(cls, given: Any) -> Any:
        """Replaces a file name by the file's words, so that a saved or resumed run does not depend on the file."""
        return read_words(given) if isinstance(given, str) else given

    @field_validator("add_words")
    @classmethod
    def _plain_words(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        bad = [word for word in words if not word or word != word.strip() or not word.isprintable()]
        if bad:
            raise ValueError(f"{bad[0]!r} is not a word: remove empty words, surrounding spaces and control characters")
        return tuple(dict.fromkeys(words))


class VlmStudent(Section):
    """An image-text-to-text model from transformers, trained unchanged with its own processor."""

    vlm: PathText = Field(description="hub id or folder")
    vlm_revision: str | None = Field(None, description="commit, tag or branch of a hub id; default: its main branch")
    max_pixels: PositiveInt | None = Field(
        None, description="per image: the processor scales larger ones down; default: the processor's own limit"
    )
    task_tokens: TaskTokenLayout | None = Field(None, description="after each image, as in an assembled student")
    trust_remote_code: bool = False

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, given: Any) -> Any:
        """Rejects keys of an assembled student; nulls from an extended recipe are ignored."""
        if not isinstance(given, Mapping):
            return given
        own = without_nulls(dict(given))
        parts = [key for key in own if key in Student.model_fields and key not in cls.model_fields]
        if parts:
            raise ValueError(
                f"'vlm' is a complete model with its own parts, tokens and processor: remove {parts}, or give 'llm' "
                "and 'encoder' instead of 'vlm'"
            )
        return own


def _student_kind(given: Any) -> str:
    vlm = given.get("vlm") if isinstance(given, Mapping) else getattr(given, "vlm", None)
    return "Student" if vlm is None else "VlmStudent"


AnyStudent = Annotated[
    Annotated[Student, Tag("Student")] | Annotated[VlmStudent, Tag("VlmStudent")], Discriminator(_student_kind)
]
"""The type of ``Run.student``. The tags are class names, which ``explain`` leaves out of messages."""
