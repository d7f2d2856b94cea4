"""Base classes for the sections of a run's configuration."""

from __future__ import annotations

from enum import Enum
from typing import Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


class Choice(str, Enum):
    """An enum of words; ``str`` gives the word itself."""

    def __str__(self) -> str:
        return str(self.value)


def without_nulls(given: Any) -> Any:
    """A mapping without its nulls, by which a recipe removes keys of an extended one; other values are unchanged."""
    return {key: value for key, value in given.items() if value is not None} if isinstance(given, dict) else given


WithoutNulls = BeforeValidator(without_nulls)


class Section(BaseModel):
    """A section of a run: immutable, rejects unknown keys, infinity and NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
