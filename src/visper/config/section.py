"""The base of every part of a run."""

from __future__ import annotations

from enum import Enum

from pydantic import BaseModel, ConfigDict


class Choice(str, Enum):
    """One of several words, written as the word alone."""

    def __str__(self) -> str:
        return str(self.value)


class Section(BaseModel):
    """A part of a run: immutable once read, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)
