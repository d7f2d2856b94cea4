"""Recipes (YAML files): reading, extending, overriding, validating and saving them.

A recipe may extend another one (``extends: other.yaml``, a file next to it or a shipped recipe), and the command line
may override values (``a.b.c=value``). All faults are reported at once, each with file, key and the nearest valid key.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from visper.common.errors import ConfigError, kind_of
from visper.config.explain import explain
from visper.config.schema import Run

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's loader if installed: it is six times as fast."""
EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def _shipped() -> Path:
    return Path(str(resources.files("visper.recipes")))


def recipe_names() -> list[str]:
    """Names of the shipped recipes, such as ``llama3-8b-vit-l/pt``, without bases (leading underscore)."""
    root = _shipped()
    files = sorted(root.rglob("*.yaml"))
    return [f.relative_to(root).with_suffix("").as_posix() for f in files if not f.name.startswith("_")]


def _find(name: str, beside: Path | None = None) -> Path:
    candidates = [Path(name)] if beside is None else [beside / name]
    shipped = _shipped()
    candidates += [shipped / name, shipped / f"{name}.yaml"]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    if candidates[0].is_dir():
        saved = candidates[0] / "run.yaml"
        hint = f": name the file in it, '{saved}'" if saved.is_file() else ": name a recipe's YAML file"
        raise ConfigError(f"'{candidates[0]}' is a folder{hint}")
    near = difflib.get_close_matches(name, recipe_names(), n=1, cutoff=0.4)
    hint = f"; did you mean '{near[0]}'?" if near else "."
    raise ConfigError(f"no recipe '{name}': neither a file nor a shipped recipe{hint} `visper recipes` lists them")


def _merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` updated with ``top``, recursively; a null in ``top`` removes the base's section."""
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def read_mapping(file: Path) -> dict[str, Any]:
    """The keys and values of a YAML file.

    Raises:
        ConfigError: it holds something else.
    """
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), Loader=LOADER)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: expected keys with values, found {kind_of(content)}")
    return content


def read_recipe(name: str | Path, _seen: tuple[Path, ...] = (), _beside: Path | None = None) -> dict[str, Any]:
    """The recipe as plain data, merged with the recipes that it extends; not yet validated."""
    path = _find(str(name), _beside)
    if path in _seen:
        raise ConfigError(f"{path}: recipes extend each other in a circle")
    content = read_mapping(path)
    given = content.pop("extends", None)
    parents = [given] if isinstance(given, str) else [] if given is None else given
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise ConfigError(f"{path}: key 'extends': expected a recipe or a list of recipes, found {given!r}")
    base: dict[str, Any] = {}
    for parent in parents:
        base = _merge(base, read_recipe(parent, (*_seen, path), path.parent))
    return _merge(base, content)


def parse_overrides(items: Iterable[str]) -> dict[str, Any]:
    """``["optimization.lr=1e-4", ...]`` as nested data; values are parsed as YAML."""
    nested: dict[str, Any] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise ConfigError(f"override '{item}': write key=value, for example optimization.lr=1e-4")
        branch: dict[str, Any] = {}
        leaf = branch
        *parents, last = key.split(".")
        for parent in parents:
            leaf = leaf.setdefault(parent, {})
        try:
            leaf[last] = _number(yaml.safe_load(value)) if value else None
        except yaml.YAMLError as error:
            raise ConfigError(f"override '{item}': the value is not valid YAML: {error}") from error
        nested = _merge(nested, branch)
    return nested


def _number(value: Any) -> Any:
    """Converts text such as ``1e-4``, which YAML 1.1 does not read as a number."""
    return float(value) if isinstance(value, str) and EXPONENT.fullmatch(value) else value


def load_run(name: str | Path, overrides: Iterable[str] = (), changes: Iterable[Mapping[str, Any]] = ()) -> Run:
    """Loads and validates a run from a recipe file or a shipped recipe's name.

    Args:
        overrides: ``key=value`` strings, applied last.
        changes: nested data, merged over the recipe in order.

    Raises:
        ConfigError: lists every fault with file and key.
    """
    data = read_recipe(name)
    for change in changes:
        data = _merge(data, change)
    data = _merge(data, parse_overrides(overrides))
    try:
        return Run.model_validate(data)
    except ValidationError as error:
        raise ConfigError(explain(error, str(name), Run, data)) from error


def save_run(run: Run, path: Path) -> None:
    """Writes the resolved run as YAML, from which ``load_run`` reads an equal run."""
    path.write_text(run_text(run), encoding="utf-8")


def run_text(run: Run) -> str:
    """The resolved run as YAML text; nulls are included, since a null can differ from the default."""
    return yaml.safe_dump(run.model_dump(mode="json", by_alias=True), sort_keys=False)
