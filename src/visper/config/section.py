"""Base classes for the sections of a run's configuration."""

from __future__ import annotations

from enum import Enum

from pydantic import BaseModel, ConfigDict


class Choice(str, Enum):
    """An enum of words; ``str`` gives the word itself."""

    def __str__(self) -> str:
        return str(self.value)


class Section(BaseModel):
    """A section of a run: immutable, rejects unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)
