"""Fingerprints: everything besides the image that determines a target. Targets of other fingerprints are not read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from visper.common.cache import key
from visper.common.errors import ConfigError
from visper.common.importing import source_of
from visper.common.manifest import content_digest
from visper.config import Target, Task
from visper.config.kinds import TEACHERS
from visper.model.revisions import HUB_ID, commit_of

COMPUTATION = 5
"""Increase this when a change to visper's own code (``open_image``, ``arrange``, ``squashed``, ``normalization_of``, a
teacher's ``encode``) changes the target of an image: targets stored before are then not found. A test compares the
pixels."""

WITHOUT_EFFECT = frozenset(("draw", "steps", "threads"))
"""Options of the kinds in ``TEACHERS`` that change how a target is drawn or how fast it is computed, not its values."""


@dataclass(frozen=True)
class Fingerprint:
    """Everything besides the image that determines a target.

    Attributes:
        revision: revision of its weights; None: a hub model whose commit neither the hub nor the local cache gave.
        options: the teacher's options that affect targets.
        background: RGB color around the image, only for the geometry ``pad``.
        code: hash of the module of a class that is not in ``TEACHERS``.
    """

    kind: str
    revision: str | None
    options: dict[str, Any]
    geometry: str
    background: list[int] | None
    code: str | None = None
    computation: int = COMPUTATION

    @classmethod
    def of(cls, teacher: Target, geometry: str, background: tuple[int, int, int]) -> Fingerprint:
        """The fingerprint of a recipe's teacher.

        Args:
            background: the RGB color that ``pad`` puts around an image.
        """
        options = json.loads(json.dumps(teacher.options))  # as read back from JSON: tuples become lists
        wanted = options.pop("revision", None)
        if teacher.kind in TEACHERS:
            options = {name: value for name, value in options.items() if name not in WITHOUT_EFFECT}
        return cls(
            teacher.kind,
            revision_of(teacher.place, wanted),
            options,
            geometry,
            list(background) if geometry == "pad" else None,
            _code_of(teacher.kind),
        )

    @property
    def key(self) -> str:
        """A hash of all fields, 16 characters."""
        return key(json.dumps(asdict(self), sort_keys=True))

    def differences(self, other: Fingerprint) -> list[str]:
        """The differences of ``other``, such as "geometry 'squash' instead of 'pad'"."""
        own, found = asdict(self), asdict(other)
        return [f"{name} {found[name]!r} instead of {own[name]!r}" for name in own if own[name] != found[name]]


def fingerprints(tasks: Mapping[str, Task], geometry: str, background: tuple[int, int, int]) -> dict[str, Fingerprint]:
    """The fingerprint of the teacher of each task that has one; arguments as in ``Fingerprint.of``."""
    return {
        task: Fingerprint.of(settings.target, geometry, background)
        for task, settings in tasks.items()
        if not settings.target.own
    }


def revision_of(model: str, wanted: str | None = None) -> str | None:
    """A string that changes when a teacher's weights do.

    A file or folder: a hash of its content, not of its path. A hub id: its commit, from the hub or, if that cannot be
    reached, from the local cache; None if neither has it. Any other name: the name.
    """
    place = Path(model)
    if place.exists():
        return f"xxh3:{content_digest(place)}"
    if not HUB_ID.fullmatch(model):
        return f"name:{model}"
    commit = commit_of(model, wanted)
    return None if commit is None else f"{model}@{commit}"


def _code_of(kind: str) -> str | None:
    if ":" not in kind:
        return None
    if kind.startswith("__main__:"):  # a script or a notebook, which also changes when the teacher does not
        raise ConfigError(
            f"teacher kind '{kind}': stored targets are found by the source of its module: move the class from the "
            "script or notebook to a module"
        )
    found = source_of(kind)
    return None if found is None else key(found.read_bytes())
