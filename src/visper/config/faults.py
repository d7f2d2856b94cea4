"""What a value should have been, in the words of a recipe: pydantic's messages speak of Python's types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

EXPECTED: Mapping[str, str] = {
    **dict.fromkeys(("tuple_type", "list_type", "set_type"), "a list"),
    **dict.fromkeys(("dict_type", "mapping_type", "model_type", "model_attributes_type"), "keys with values"),
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float", "int_parsing_size"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    "string_type": "a text",
    "string_pattern_mismatch": "a text of the pattern {pattern}",
    **dict.fromkeys(("literal_error", "enum"), "{expected}"),
    "greater_than": "a number greater than {gt}",
    "greater_than_equal": "a number greater than or equal to {ge}",
    "less_than": "a number less than {lt}",
    "less_than_equal": "a number less than or equal to {le}",
    **dict.fromkeys(("byte_size", "byte_size_unit"), "a size such as '18 GB'"),
    "finite_number": "a finite number",
    "too_short": "at least {min_length} entries",
    "too_long": "at most {max_length} entries",
}
"""Type of a fault -> what was expected, with the fault's own values."""
_LONGEST = 100


def expected(fault: Mapping[str, Any]) -> str:
    """What one of pydantic's faults asks for, beginning with "expected", or the message of a check of our own."""
    form = EXPECTED.get(fault["type"])
    if form is None:
        return str(fault["msg"]).removeprefix("Value error, ")
    limits = {name: _plain(value) for name, value in fault.get("ctx", {}).items()}
    return f"expected {form.format(**limits)}".replace("at least 1 entries", "at least one entry")


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def found(value: Any) -> str:
    """The value as an error shows it, shortened; a null as "nothing"."""
    if value is None:
        return "nothing"
    shown = repr(value)
    return shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]}..."
