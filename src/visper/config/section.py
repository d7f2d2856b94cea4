"""Base classes for the sections of a run's configuration."""

from __future__ import annotations

import re
from enum import Enum
from typing import Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationInfo, field_validator
from pydantic_core import PydanticKnownError


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

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_truth_value(cls, value: Any, info: ValidationInfo) -> Any:
        """Rejects a truth value as a number, which pydantic takes for 0 or 1. A share that may be `auto` may be one."""
        kinds = repr(cls.model_fields[str(info.field_name)].annotation)
        held = value if isinstance(value, list) else value.values() if isinstance(value, dict) else [value]
        is_number = re.search(r"\b(int|float)\b", kinds) and not re.search(r"\b(bool|auto)\b", kinds)
        if is_number and any(isinstance(one, bool) for one in held):
            raise PydanticKnownError("int_type" if "int" in kinds else "float_type")
        return value
