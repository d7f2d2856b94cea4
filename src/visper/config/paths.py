"""Expansion of ``~`` and ``$VARIABLES`` in the paths of runs and commands."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, WithJsonSchema


def expand_path(path: str) -> str:
    """``path`` with ``~``, ``$NAME`` and ``${NAME}`` expanded; hub ids and URLs are left unchanged.

    Raises:
        ValueError: a variable is not set, or the home folder is unknown.
    """
    expanded = os.path.expandvars(path)
    unset = re.search(r"\$\{?([A-Za-z_]\w*)\}?", expanded)
    if unset:
        raise ValueError(f"path '{path}' names the variable {unset[1]}, which is not set: export it or write the path")
    if expanded.startswith("~"):
        try:
            return str(Path(expanded).expanduser())
        except RuntimeError as error:
            raise ValueError(f"path '{path}': {error}: write the path in full") from error
    return expanded


PathText = Annotated[str, AfterValidator(expand_path), WithJsonSchema({"type": "string", "format": "path"})]
"""The type of a field that holds a path or a hub id; ``explain`` tells it from other texts by its format."""


def read_words(path: str) -> list[str]:
    """The non-empty lines of a text file, stripped.

    Raises:
        ValueError: the file cannot be read.
    """
    place = Path(expand_path(path))
    try:
        lines = place.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"cannot read words from '{place}' ({error}): give a list, or a UTF-8 text file with one word per line"
        ) from error
    return [line.strip() for line in lines if line.strip()]
