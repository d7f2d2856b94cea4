"""Paths as people write them: ``~`` and ``$VARIABLES`` are expanded wherever a run or a command names a path."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator


def expand_path(path: str) -> str:
    """``path`` with ``~``, ``$NAME`` and ``${NAME}`` expanded; hub ids and addresses stay as they are.

    Raises:
        ValueError: a variable is not set, or a home folder is not known.
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


PathText = Annotated[str, AfterValidator(expand_path)]
"""A field that holds a path, or a hub id."""
