"""The faults that pydantic finds in a recipe, as messages with file, key, what was expected and the nearest key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from visper.config.faults import expected, found

Schema = dict[str, Any]
_NO_KEY = re.compile(r"(literal|tuple)\[.*\]|\[key\]|Student|VlmStudent|number|word")
"""Parts of a location that are no keys: members and tags of a union, and the mark of a wrong key of a mapping."""
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
    whole = model.model_json_schema()
    places = [[str(part) for part in fault["loc"] if not _NO_KEY.fullmatch(str(part))] for fault in faults]
    refused = [place for fault, place in zip(faults, places, strict=True) if fault["loc"][-1:] == ("[key]",)]
    lines: dict[str, str] = {}
    for fault, place in zip(faults, places, strict=True):
        if fault["type"] in _OF_A_WHOLE and any(other[: len(place)] == place != other for other in places):
            continue  # the fault of an entry is listed
        if any(place[: len(key)] == key != place for key in refused):
            continue  # what is under a key that is refused anyway
        shown = ".".join(place)
        last = fault["loc"][-1] if fault["loc"] else None
        if fault["type"] == "extra_forbidden":
            lines[shown] = f"{name}: unknown key '{shown}': {_hint(last, _keys(_at(fault['loc'][:-1], whole)))}"
        elif last == "[key]":
            lines[shown] = f"{name}: unknown key '{shown}': {expected(fault)}"
        elif fault["type"] == "missing" and not isinstance(last, int):
            lines[shown] = f"{name}: key '{shown}' is missing{_beside(fault['loc'], whole, given)}"
        else:
            start = f"{name}: key '{shown}': " if shown else f"{name}: "  # without a key: keys that exclude each other
            before = lines[shown].partition(", found ")[0] + " or " if shown in lines else start
            message = _message(fault, whole)
            lines[shown] = before + (message.removeprefix("expected ") if shown in lines else message)
    return "\n".join(lines.values())


def _hint(key: Any, valid: list[str]) -> str:
    near = difflib.get_close_matches(str(key), valid, n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else f"valid here: {', '.join(valid)}"


def _beside(location: Sequence[Any], whole: Schema, given: Any) -> str:
    """For a missing key of a new entry of a mapping: the entries that may have been meant."""
    *parents, entry, _ = location if len(location) > 1 else (None, None)
    if not any(isinstance(one.get("additionalProperties"), dict) for one in _at(parents, whole)):
        return ""
    for parent in parents:
        given = given.get(parent) if isinstance(given, Mapping) else None
    others = [str(key) for key, value in (given or {}).items() if key != entry and value is not None]
    near = difflib.get_close_matches(str(entry), others, n=1)
    known = f"; known: {', '.join(others)}" if others else ""
    return f": '{entry}' is new, so it needs this key{known}" + (f". Did you mean '{near[0]}'?" if near else "")


def _message(fault: Mapping[str, Any], whole: Schema) -> str:
    kind, value = fault["type"], fault["input"]
    if kind == "missing":  # an entry of a list of fixed length
        return f"expected {fault['loc'][-1] + 1} or more entries, found {found(value)}"
    text = expected(fault)
    if kind == "literal_error" and fault["loc"][-1] == "word":
        text += " or a number"
    if kind in _LISTS:
        of_entries, remedy = _list_of(value, _at(fault["loc"], whole), whole)
        return (
            f"{text} of {of_entries}, found {'keys with values' if isinstance(value, dict) else found(value)}{remedy}"
        )
    if kind in _MAPPINGS:
        keys = _keys(_at(fault["loc"], whole))
        text += f" ({', '.join(keys)})" if keys else ", as in {key: value}"
    named = isinstance(value, dict) or (kind == "value_error" and repr(value) in text)  # by a check of our own
    text += "" if named else f", found {found(value)}"
    return text + (": put it in quotes" if kind == "string_type" and isinstance(value, (int, float)) else "")


def _list_of(value: Any, schemas: list[Schema], whole: Schema) -> tuple[str, str]:
    """What a list has to contain, and how a single entry, given without its list, is written."""
    several = next((one for one in schemas if one.get("type") == "array"), {})
    fixed = several.get("prefixItems", [])
    (item, *_) = _alternatives((fixed or [several.get("items", {})])[0], whole)
    count, is_number = f"{len(fixed)} " if fixed else "", item.get("type") in ("integer", "number")
    if "properties" in item:
        remedy = ": put it in brackets, [{...}]" if isinstance(value, dict) else ": write [{KEY: VALUE, ...}]"
        return f"{count}entries with the keys {', '.join(_keys([item]))}", remedy
    kind = "paths" if item.get("format") == "path" else "numbers" if is_number else "texts"
    if fixed or (is_number and not isinstance(value, (int, float))):
        return f"{count}{kind}", ": write it as in [1, 2]"
    return f"{count}{kind}", f": write [{value}]" if isinstance(value, (str, int, float)) else ""


def _keys(schemas: list[Schema]) -> list[str]:
    """The keys of a section; none of a mapping with free keys."""
    return [key for one in schemas for key in one.get("properties", ())]


def _at(location: Sequence[Any], whole: Schema) -> list[Schema]:
    """The JSON schemas of the value at ``location``, several for a union."""
    schemas = [whole]
    for part in location:
        inner = [found for one in schemas for entry in _inner(one, part) for found in _alternatives(entry, whole)]
        schemas = inner or [one for one in schemas if one.get("title") == part] or schemas
    return schemas


def _inner(schema: Schema, part: Any) -> list[Schema]:
    """The schema of a part of a value: a field of a section, an entry of a mapping or of a list."""
    if isinstance(part, int):
        entry = (schema.get("prefixItems") or [schema.get("items")])[0]
    else:
        entry = schema.get("properties", {}).get(part, schema.get("additionalProperties"))
    return [entry] if isinstance(entry, dict) else []


def _alternatives(schema: Schema, whole: Schema) -> list[Schema]:
    """The members of a union, or the schema itself, without references."""
    if "$ref" in schema:
        schema = whole["$defs"][schema["$ref"].rpartition("/")[2]]
    members = schema.get("anyOf") or schema.get("oneOf")
    return [one for member in members for one in _alternatives(member, whole)] if members else [schema]
