"""What made a target: teacher, revision, options, preprocessing. Targets of anything else are never read for it."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, try_to_load_from_cache

from visper.common.cache import key
from visper.config import Teacher as TeacherSettings
from visper.config.teacher_kinds import TEACHERS

COMPUTATION = 1
"""Raise it when our own code (``open_image``, ``arrange``, ``SquashedImage``, a teacher's ``encode``) gives another
target of the same picture: what was kept before is then no longer met. A test watches the pixels."""

WITHOUT_EFFECT = frozenset(("draw", "steps", "threads"))
"""Options of our kinds that change how a prediction is drawn, or how fast a target is made, and no target."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Fingerprint:
    """Everything but the picture that a target follows from.

    Attributes:
        kind: of the teacher.
        revision: of its weights; None: a hub model of which neither the hub nor the hub's cache could be asked.
        options: of the kind, as far as targets follow from them.
        geometry: in which the teacher sees the picture; ``background`` with ``pad`` only, RGB.
        code: of a teacher of your own, a hash of its module.
        computation: of our code, ``COMPUTATION``.
    """

    kind: str
    revision: str | None
    options: dict[str, Any]
    geometry: str
    background: list[int] | None
    code: str | None = None
    computation: int = COMPUTATION

    @classmethod
    def of(cls, teacher: TeacherSettings, geometry: str, background: tuple[int, int, int]) -> Fingerprint:
        """For a recipe's teacher.

        Args:
            teacher: the task's, in the recipe.
            geometry: of the run's data.
            background: what ``pad`` puts around a picture.
        """
        options = json.loads(json.dumps(teacher.options))  # as they will be read back: tuples become lists
        wanted = options.pop("revision", None)
        if teacher.kind in TEACHERS:
            options = {name: value for name, value in options.items() if name not in WITHOUT_EFFECT}
        return cls(
            teacher.kind,
            revision_of(teacher.model, wanted),
            options,
            geometry,
            list(background) if geometry == "pad" else None,
            _code_of(teacher.kind),
        )

    @property
    def key(self) -> str:
        """Sixteen characters that differ wherever a field does."""
        return key(json.dumps(asdict(self), sort_keys=True))

    def differences(self, other: Fingerprint) -> list[str]:
        """Where ``other`` differs, in words."""
        ours, theirs = asdict(self), asdict(other)
        return [f"{name} {theirs[name]!r} instead of {ours[name]!r}" for name in ours if ours[name] != theirs[name]]


def revision_of(model: str, wanted: str | None = None) -> str | None:
    """What changes when a teacher's weights do.

    A file or folder: a hash of its content, wherever it lies. A hub id: its commit, as the hub says or, out of its
    reach, the hub's cache. Any other name stands for itself.
    """
    place = Path(model)
    if place.exists():
        return f"sha256:{_content_hash(place)}"
    if not _HUB_ID.fullmatch(model):
        return f"name:{model}"
    commit = _commit(model, wanted)
    return None if commit is None else f"{model}@{commit}"


def _commit(model: str, wanted: str | None) -> str | None:
    if wanted and re.fullmatch(r"[0-9a-f]{40}", wanted):
        return wanted
    try:
        sha = HfApi().model_info(model, revision=wanted, timeout=10).sha
        return None if sha is None else str(sha)
    except Exception:  # noqa: BLE001 - errors of the hub's HTTP library, which is another one in other versions
        for name in ("config.json", "model_index.json", "preprocessor_config.json"):
            cached = try_to_load_from_cache(model, name, revision=wanted)
            if isinstance(cached, str):
                return re.split(r"[\\/]snapshots[\\/]", cached)[1][:40]
        return None


def _content_hash(place: Path) -> str:
    """Of a model's folder: everything but hidden files and notes. Of a file: itself and what ONNX keeps beside it."""
    if place.is_dir():
        found = [file for file in place.rglob("*") if file.is_file() and file.suffix != ".md"]
        files = [file for file in found if not any(part.startswith(".") for part in file.relative_to(place).parts)]
        names = {file.relative_to(place).as_posix(): file for file in files}
    else:
        beside = re.compile(re.escape(place.name) + r"[._].*|" + re.escape(place.stem) + r"\.(data|bin|weights)")
        names = {file.name.replace(place.stem, "", 1): file for file in place.parent.iterdir() if file.is_file()}
        names = {name: file for name, file in names.items() if file == place or beside.fullmatch(file.name)}
    total = hashlib.sha256()
    for name in sorted(names):
        content = hashlib.sha256()
        with names[name].open("rb") as stream:
            while block := stream.read(_BLOCK):
                content.update(block)
        total.update(f"{name}\0{content.hexdigest()}\0".encode())
    return total.hexdigest()[:32]


def _code_of(kind: str) -> str | None:
    if ":" not in kind:
        return None
    found = find_spec(kind.split(":", 1)[0])
    return None if found is None or found.origin is None else key(Path(found.origin).read_bytes())
