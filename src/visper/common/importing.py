"""Imports the classes and functions that a recipe names as "module:name"."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from visper.common.errors import ConfigError


def import_named(place: str) -> Any:
    """The object at "module:name".

    Raises:
        ConfigError: there is no such module, or it has no such name.
        ImportError: the module itself fails to import another one.
    """
    module_name, name = place.split(":", 1)
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # a package that the module needs
        raise ConfigError(
            f"no module '{module_name}': it must be importable, so install it, or put the folder that contains it on "
            "PYTHONPATH (PYTHONPATH=FOLDER visper ...)"
        ) from error
    if not hasattr(module, name):
        near = get_close_matches(name, [other for other in vars(module) if not other.startswith("_")], n=1)
        hint = f": did you mean '{near[0]}'?" if near else ": check the name after the colon"
        raise ConfigError(f"module '{module_name}' has no '{name}'{hint}")
    return getattr(module, name)


def source_of(place: str) -> Path | None:
    """The file of the module in "module:name"; None if there is none, as for a notebook or an absent module."""
    try:
        found = find_spec(place.split(":", 1)[0])
    except (ModuleNotFoundError, ValueError):  # its package is not here; ``__main__`` may have no spec
        return None
    return None if found is None or found.origin is None or not found.has_location else Path(found.origin)
