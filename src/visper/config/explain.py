"""The faults that pydantic finds in a recipe, as messages with file, key, what was expected and the nearest key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from visper.config.faults import expected, found
from visper.config.paths import PathText
from visper.config.schema import UNION_TAGS
from visper.config.student import Student, VlmStudent

STUDENTS: dict[str, type[BaseModel]] = {"Student": Student, "VlmStudent": VlmStudent}
"""The kinds of students by the tags that pydantic puts into the location of a fault."""
_UNION_MEMBER = re.compile(r"(literal|tuple)\[.*\]|\[key\]")
"""Further parts of a location that are no keys: the members of a union, and the mark of a wrong key of a mapping."""
_OF_A_WHOLE = ("too_short", "literal_error")
"""Faults that follow from one of an entry: pydantic counts only valid entries, and a list is not a word of a union."""
_LISTS, _MAPPINGS = ("tuple_type", "list_type"), ("dict_type", "model_type", "model_attributes_type")


def explain(error: ValidationError, name: str, model: type[BaseModel], given: Any = None) -> str:
    """The faults of a validation against ``model``, one per line, with file, key and the nearest valid key.

    Args:
        name: the file, at the beginning of each line.
        given: the validated data, to name the entries beside one that is incomplete.
    """
    faults: Any = error.errors()
    places = [_place(fault["loc"]) for fault in faults]
    lines: dict[str, str] = {}
    for fault, place in zip(faults, places, strict=True):
        if fault["type"] in _OF_A_WHOLE and any(other[: len(place)] == place != other for other in places):
            continue  # the fault of an entry is listed
        shown = ".".join(place) or f"(the whole {model.__name__.lower()})"
        if fault["type"] == "extra_forbidden":
            valid = _keys_at(model, fault["loc"][:-1])
            lines[shown] = f"{name}: unknown key '{shown}': {_hint(fault['loc'][-1], valid)}"
        elif fault["loc"] and fault["loc"][-1] == "[key]":
            lines[shown] = f"{name}: unknown key '{shown}': {expected(fault)}"
        elif fault["type"] == "missing" and not isinstance(fault["loc"][-1], int):
            lines[shown] = f"{name}: key '{shown}' is missing{_beside(fault['loc'], model, given)}"
        else:
            before = lines[shown].partition(", found ")[0] + " or " if shown in lines else f"{name}: key '{shown}': "
            message = _message(fault, model)
            lines[shown] = before + (message.removeprefix("expected ") if shown in lines else message)
    return "\n".join(lines.values())


def _place(location: Sequence[Any]) -> list[str]:
    parts = (str(part) for part in location if part not in (*STUDENTS, *UNION_TAGS))
    return [part for part in parts if not _UNION_MEMBER.fullmatch(part)]


def _hint(key: Any, valid: list[str]) -> str:
    near = difflib.get_close_matches(str(key), valid, n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else f"valid here: {', '.join(valid)}"


def _beside(location: Sequence[Any], model: type[BaseModel], given: Any) -> str:
    """For a missing key of a new entry of a mapping: the entries that may have been meant."""
    *parents, entry, _ = location if len(location) > 1 else (None, None)
    if get_origin(next(_alternatives(_kind_at(model, parents)), None)) is not dict:
        return ""
    for parent in parents:
        given = given.get(parent) if isinstance(given, Mapping) else None
    others = [str(key) for key, value in (given or {}).items() if key != entry and value is not None]
    near = difflib.get_close_matches(str(entry), others, n=1)
    known = f"; known: {', '.join(others)}" if others else ""
    return f": '{entry}' is new, so it needs this key{known}" + (f". Did you mean '{near[0]}'?" if near else "")


def _message(fault: Mapping[str, Any], model: type[BaseModel]) -> str:
    kind, value = fault["type"], fault["input"]
    if kind == "missing":  # an entry of a list of fixed length
        return f"expected {fault['loc'][-1] + 1} or more entries, found {found(value)}"
    text = expected(fault)
    if kind == "literal_error" and fault["loc"][-1] in UNION_TAGS:
        text += " or a number"
    if kind in _LISTS:
        text += _list_of(model, fault["loc"])
    elif kind in _MAPPINGS:
        keys = _keys_at(model, fault["loc"])
        text += f" ({', '.join(keys)})" if keys else ", as in {key: value}"
    shown = "keys with values" if isinstance(value, dict) and kind in _LISTS else found(value)
    text += f", found {shown}" if not isinstance(value, dict) or kind in _LISTS else ""
    if kind == "string_type" and isinstance(value, (int, float)):
        text += ": put it in quotes"
    return text + (_bracketed(value, model, fault["loc"]) if kind in _LISTS else "")


def _list_of(model: type[BaseModel], location: Sequence[Any]) -> str:
    item, length = _entries_at(model, location)
    count = "" if length is None else f"{length} "
    if item == PathText:
        return f" of {count}paths"
    if _section_in(item) is not None:
        return f" of {count}entries with the keys {', '.join(_keys(_section_in(item)))}"
    return f" of {count}numbers" if _is_number(item) else f" of {count}texts"


def _bracketed(value: Any, model: type[BaseModel], location: Sequence[Any]) -> str:
    """How a single entry, given without its list, is written."""
    item, length = _entries_at(model, location)
    if _section_in(item) is not None:
        return ": put it in brackets, [{...}]" if isinstance(value, dict) else ": write [{KEY: VALUE, ...}]"
    if length is not None or (_is_number(item) and not isinstance(value, (int, float))):
        return ": write it as in [1, 2]"
    return f": write [{value}]" if isinstance(value, (str, int, float)) else ""


def _is_number(kind: Any) -> bool:
    return any(one in (int, float) for one in _alternatives(kind))


def _entries_at(model: type[BaseModel], location: Sequence[Any]) -> tuple[Any, int | None]:
    """The type of the entries of the list at ``location``, and their number if it is fixed."""
    for kind in _alternatives(_kind_at(model, location)):
        if get_origin(kind) in (tuple, list):
            entries = get_args(kind)
            return entries[0], None if get_origin(kind) is list or Ellipsis in entries else len(entries)
    return str, None


def _keys_at(model: type[BaseModel], location: Sequence[Any]) -> list[str]:
    """The valid keys of the section at ``location``; empty if it is free-form."""
    kind = _kind_at(model, location)
    mapping = any(get_origin(one) is dict for one in _alternatives(kind))
    return [] if mapping else _keys(_section_in(kind))


def _keys(section: type[BaseModel] | None) -> list[str]:
    return [field.alias or name for name, field in section.model_fields.items()] if section else []


def _kind_at(model: type[BaseModel], location: Sequence[Any]) -> Any:
    """The declared type of the value at ``location``; None if it is not declared."""
    kind: Any = model
    for part in location:
        if part in STUDENTS:
            kind = STUDENTS[part]
        elif part not in UNION_TAGS and not _UNION_MEMBER.fullmatch(str(part)):
            kind = next((inner for one in _alternatives(kind) for inner in _inner(one, part)), None)
    return kind


def _inner(kind: Any, part: Any) -> Iterator[Any]:
    """The type of a part of a value: a field of a section, an entry of a mapping or of a list."""
    if get_origin(kind) is dict:
        yield get_args(kind)[1]
    elif get_origin(kind) in (tuple, list):
        yield get_args(kind)[0]
    elif get_origin(kind) is None and isinstance(kind, type) and issubclass(kind, BaseModel):
        yield from (field.annotation for name, field in kind.model_fields.items() if part in (name, field.alias))


def _alternatives(kind: Any) -> Iterator[Any]:
    """The members of a union, or the type itself, without annotations and None."""
    if get_origin(kind) is Annotated:
        yield from _alternatives(get_args(kind)[0])
    elif get_origin(kind) in (Union, UnionType):
        for member in get_args(kind):
            yield from _alternatives(member)
    elif kind not in (None, NoneType):
        yield kind


def _section_in(kind: Any) -> type[BaseModel] | None:
    # In Python 3.10, dict[str, X] is an instance of type, too.
    sections = (one for one in _alternatives(kind) if get_origin(one) is None and isinstance(one, type))
    return next((one for one in sections if issubclass(one, BaseModel)), None)
