"""What a first stage begins with: a student assembled of parts, or a complete model of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Discriminator, Field, PositiveInt, Tag, field_validator, model_validator

from visper.config.kinds import check_task_name
from visper.config.paths import PathText, read_words
from visper.config.section import Section


class TaskTokenLayout(Section):
    """The task tokens behind the image tokens, in every stage and at inference (paper, section 3)."""

    order: tuple[str, ...] = ("depth", "seg", "gen")
    per_task: PositiveInt = 8

    @model_validator(mode="after")
    def _names_once(self) -> TaskTokenLayout:
        if len(set(self.order)) != len(self.order):
            raise ValueError(f"a task stands twice in order {list(self.order)}: name each once")
        for name in self.order:
            check_task_name(name)
        return self


class Student(Section):
    """The parts a first stage assembles; a later stage starts from a folder instead."""

    llm: PathText = Field(description="causal LLM: hub id or folder")
    llm_revision: str | None = Field(None, description="commit, tag or branch of a hub id; default: its main branch")
    encoder: PathText = Field(description="image encoder: hub id or folder")
    encoder_revision: str | None = Field(None, description="likewise, of the encoder's")
    feature_layer: int = Field(-2, description="encoder layer the projector reads; negative counts from the end")
    image_size: PositiveInt | None = Field(None, description="pixels a side; default: the encoder's own")
    system_prompt: str | None = Field(None, description="put first where a conversation has no system turn")
    task_tokens: TaskTokenLayout | None = Field(TaskTokenLayout(), description="null: a plain LLaVA student")
    add_words: tuple[str, ...] = Field(
        default=(), description="words that get a token of their own: a list, or a text file with one a line"
    )
    trust_remote_code: bool = False

    @field_validator("add_words", mode="before")
    @classmethod
    def _read_words(cls, given: Any) -> Any:
        """A file's words become the run's: a run that is saved or resumed no longer depends on the file."""
        return read_words(given) if isinstance(given, str) else given

    @field_validator("add_words")
    @classmethod
    def _plain_words(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        bad = [word for word in words if not word or word != word.strip() or not word.isprintable()]
        if bad:
            raise ValueError(f"{bad[0]!r} is no word: remove spaces around it and control characters")
        return tuple(dict.fromkeys(words))


class VlmStudent(Section):
    """An image-text-to-text model of transformers, trained as it is, with its own processor."""

    vlm: PathText = Field(description="hub id or folder")
    vlm_revision: str | None = Field(None, description="commit, tag or branch of a hub id; default: its main branch")
    max_pixels: PositiveInt | None = Field(
        None, description="of an image: the processor scales larger ones down; default: the processor's own limit"
    )
    task_tokens: TaskTokenLayout | None = Field(None, description="behind each image, as in a student of parts")
    trust_remote_code: bool = False

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, given: Any) -> Any:
        """Refuses what only a student of parts has; nulls of an extended recipe are left out."""
        if not isinstance(given, Mapping):
            return given
        own = {key: value for key, value in given.items() if value is not None}
        parts = [key for key in own if key in Student.model_fields and key not in cls.model_fields]
        if parts:
            raise ValueError(
                f"'vlm' names a complete model, which brings its own parts, tokens and processor: remove {parts}, or "
                "give 'llm' and 'encoder' in place of 'vlm'"
            )
        return own


def _student_kind(given: Any) -> str:
    vlm = given.get("vlm") if isinstance(given, Mapping) else getattr(given, "vlm", None)
    return "Student" if vlm is None else "VlmStudent"


AnyStudent = Annotated[
    Annotated[Student, Tag("Student")] | Annotated[VlmStudent, Tag("VlmStudent")], Discriminator(_student_kind)
]
"""What a first stage begins with; the tags are the classes' names, which ``load.explain`` leaves out of messages."""
