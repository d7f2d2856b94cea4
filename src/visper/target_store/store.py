"""Targets computed once, in memory-mapped safetensors files, looked up by what the picture's file contains.

Layout of a store::

    store.json                       the format and the dtype of all its targets
    depth_anything-0f3a.../          one folder a teacher, options and preprocessing; the name ends with their key
        teacher.json                 what made these targets, and their shape
        5b2e....safetensors          a part: targets [n, N, E], scales, digests [n, 16] of the pictures, and those of
                                     pictures that cannot be decoded; named after the pictures it covers

A part is complete or absent. What is looked up is the digest of the bytes that were decoded, in the folder of the very
teacher: a changed picture or teacher is not found, whatever it is called.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from visper.common.errors import ConfigError, DataError
from visper.common.files import atomic_path, write_text
from visper.data.checks.digests import DIGEST_BYTES, digest
from visper.distillation.teachers.base import TargetSpec, Teacher
from visper.target_store.fingerprint import Fingerprint
from visper.target_store.quantize import Packing

FORMAT = "visper-targets-1"
STORE, TEACHER = "store.json", "teacher.json"
_UNREADABLE = -1


def write_part(
    folder: Path, packing: Packing, digests: Sequence[bytes], targets: Sequence[Tensor | None], name: str
) -> None:
    """Writes one part, whole or not at all.

    Args:
        folder: of the teacher.
        packing: of its targets.
        digests: of the pictures.
        targets: of each ``[N, E]``; None for a picture that cannot be decoded.
        name: of the part.
    """
    good = [i for i, target in enumerate(targets) if target is not None]
    empty = torch.empty(0, packing.spec.tokens, packing.spec.width)
    values, scales = packing.pack(torch.stack([targets[i] for i in good]) if good else empty)  # type: ignore[misc]
    tensors = {
        "targets": values,
        "digests": _as_tensor([digests[i] for i in good]),
        "unreadable": _as_tensor([own for own, target in zip(digests, targets, strict=True) if target is None]),
    }
    if scales is not None:
        tensors["scales"] = scales
    with atomic_path(folder / f"{name}.safetensors") as partial:
        save_file(tensors, partial, metadata={"format": FORMAT})
        # safetensors lets nobody else read what it writes; a store is shared as far as its other files are.
        partial.chmod((folder / TEACHER).stat().st_mode & 0o777)


def _as_tensor(digests: list[bytes]) -> Tensor:
    flat = np.frombuffer(b"".join(digests), dtype=np.uint8).copy()
    return torch.from_numpy(flat).view(-1, DIGEST_BYTES)


@dataclass(frozen=True)
class StoredTeacher:
    """What a teacher's folder says of itself; ``model`` and ``versions`` are for people."""

    fingerprint: Fingerprint
    spec: TargetSpec
    precision: str
    model: str
    versions: dict[str, str]

    @classmethod
    def read(cls, folder: Path) -> StoredTeacher:
        """Raises ConfigError where the folder is not a teacher's."""
        try:
            found = json.loads((folder / TEACHER).read_text(encoding="utf-8"))
            spec = found.pop("spec")
            grid = tuple(spec["grid"]) if spec["grid"] else None
            return cls(
                fingerprint=Fingerprint(**found.pop("fingerprint")),
                spec=TargetSpec(spec["tokens"], spec["width"], grid),
                **found,
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"'{folder}' is no teacher's folder of a targets store: {error}; remove it") from error

    def write(self, folder: Path) -> None:
        """Writes ``teacher.json``, whole or not at all."""
        write_text(folder / TEACHER, json.dumps(asdict(self), indent=1) + "\n")


class TaskTargets:
    """One teacher's targets in a store, memory-mapped; it can be sent to another process, which maps them again.

    Raises:
        ConfigError: a file there is none of ours, or broken.
    """

    def __init__(self, folder: Path, dtype: str) -> None:
        self.folder = folder
        self.teacher = StoredTeacher.read(folder)
        self.packing = Packing(self.teacher.spec, dtype)
        self.parts = sorted(folder.glob("*.safetensors"))
        self._open: dict[int, Any] = {}
        digests, places = [np.zeros(0, f"S{DIGEST_BYTES}")], [np.zeros((0, 2), np.int32)]
        for number in range(len(self.parts)):
            for name in ("digests", "unreadable"):
                own = self._read(number).get_tensor(name).numpy().reshape(-1).view(f"S{DIGEST_BYTES}")
                rows = np.arange(len(own)) if name == "digests" else np.full(len(own), _UNREADABLE)
                digests.append(own)
                places.append(np.stack((np.full(len(own), number), rows), 1).astype(np.int32))
            self._open.pop(number)  # most processes need few of thousands of parts
        everything = np.concatenate(digests)
        order = np.argsort(everything, kind="stable")
        self._digests, self._places = everything[order], np.concatenate(places)[order]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.folder, self.packing.dtype)

    def __len__(self) -> int:
        return len(self._digests)

    def known(self, digests: Sequence[bytes]) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which pictures were computed, or found to be undecodable, ``[len(digests)]``."""
        return np.asarray(self._rows(np.asarray(digests, dtype=self._digests.dtype)) >= 0)

    def read(self, picture: bytes) -> Tensor | None:
        """The packed target ``[target_bytes]`` uint8 of the picture with this digest; None: there is none."""
        row = int(self._rows(np.asarray([picture], dtype=self._digests.dtype))[0])
        if row < 0 or self._places[row, 1] == _UNREADABLE:
            return None
        number, at = self._places[row].tolist()
        part = self._read(number)
        scales = part.get_slice("scales")[at] if self.packing.scales[0] else None
        return self.packing.joined(part.get_slice("targets")[at], scales)

    def _rows(self, digests: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.int64]]:
        if not len(self._digests):
            return np.full(len(digests), -1)
        rows = np.searchsorted(self._digests, digests).clip(max=len(self._digests) - 1)
        return np.where(self._digests[rows] == digests, rows, -1)

    def _read(self, number: int) -> Any:
        if number not in self._open:
            try:
                part = safe_open(self.parts[number], "pt")
                found = (part.metadata() or {}).get("format")
            except (OSError, SafetensorError) as error:
                raise ConfigError(
                    f"'{self.parts[number]}' cannot be read: {error}; remove it and build the targets again"
                ) from error
            if found != FORMAT:
                raise ConfigError(f"'{self.parts[number]}' has the format {found!r}, expected {FORMAT!r}: remove it")
            self._open[number] = part
        return self._open[number]


class UnpackedTargets(Teacher):
    """Stands where a teacher stands, without one: given packed targets ``[B, target_bytes]``, gives targets."""

    def __init__(self, packing: Packing) -> None:
        super().__init__()
        self.packing, self.spec = packing, packing.spec
        self.freeze()

    def encode(self, pixels: Tensor) -> Tensor:
        """``[B, N, E]`` float32."""
        return self.packing.unpack(pixels)

    def decode(self, embedding: Tensor, pixels: Tensor | None = None, reference: Tensor | None = None) -> Tensor:
        """Only the teacher itself can draw."""
        raise ValueError("a targets store has no teacher to draw with: build the teacher (visper.distillation)")


class TargetStore:
    """The targets of a run's tasks.

    Args:
        tasks: task -> its teacher's targets.
        remedy: the command that computes what is missing.
    """

    def __init__(self, tasks: Mapping[str, TaskTargets], remedy: str) -> None:
        self.tasks = dict(tasks)
        self.remedy = remedy

    def teachers(self) -> dict[str, Teacher]:
        """What the engine asks for targets, by task."""
        return {task: UnpackedTargets(targets.packing) for task, targets in self.tasks.items()}

    def lookup(self, content: bytes) -> dict[str, Tensor]:
        """The packed targets of a picture, by task, given the bytes of its file.

        Raises:
            DataError: there is none; the picture changed, or was never taught.
        """
        own = digest(content)
        found = {}
        for task, targets in self.tasks.items():
            packed = targets.read(own)
            if packed is None:
                raise DataError(
                    "no stored target",
                    f"task '{task}': a picture of this content (sha256 {own.hex()}...) is not in "
                    f"'{targets.folder}'; it is new or was changed: {self.remedy}",
                )
            found[task] = packed
        return found

    def lacking(self, digests: Iterable[bytes]) -> dict[str, list[bytes]]:
        """Per task, the pictures among these that were not computed; tasks that have all are left out."""
        wanted = list(dict.fromkeys(digests))
        lacking = {}
        for task, targets in self.tasks.items():
            lost = [own for own, known in zip(wanted, targets.known(wanted), strict=True) if not known]
            if lost:
                lacking[task] = lost
        return lacking


def read_dtype(store: Path) -> str | None:
    """The dtype of a store; None where there is none yet.

    Raises:
        ConfigError: it is of another format.
    """
    try:
        found = json.loads((store / STORE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"'{store / STORE}' cannot be read: {error}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ConfigError(f"'{store}' is no targets store of the format {FORMAT!r}: name another folder")
    return str(found["dtype"])


def claim_store(store: Path, dtype: str) -> None:
    """Makes a store of ``dtype``, or finds that it is one.

    Raises:
        ConfigError: it holds another dtype, or something else.
    """
    found = read_dtype(store)
    if found is None:
        others = [file.name for file in store.iterdir() if not file.name.startswith(".")] if store.exists() else []
        if others:
            raise ConfigError(f"'{store}' holds {others[:3]} and no targets store: name a new folder")
        write_text(store / STORE, json.dumps({"format": FORMAT, "dtype": dtype}) + "\n")
    elif found != dtype:
        raise ConfigError(
            f"'{store}' holds targets as {found}, asked for {dtype}: name another folder, or --dtype {found}"
        )


def folder_of(store: Path, fingerprint: Fingerprint) -> Path:
    """Where a teacher's targets lie in a store."""
    return store / f"{re.sub(r'[^A-Za-z0-9]+', '_', fingerprint.kind)}-{fingerprint.key}"


def find_targets(store: Path, task: str, fingerprint: Fingerprint, model: str, remedy: str) -> TaskTargets:
    """The targets that this teacher made.

    Args:
        store: the folder.
        task: whose they are, for messages.
        fingerprint: the teacher; where its revision is not known here, the only one of ``model`` in the store is taken.
        model: the recipe's.
        remedy: the command that builds what is missing.

    Raises:
        ConfigError: there are none; the message says what the store has instead.
    """
    dtype = read_dtype(store)
    if dtype is None:
        raise ConfigError(f"distillation.targets: there is no targets store at '{store}': {remedy}")
    folder = folder_of(store, fingerprint)
    if (folder / TEACHER).is_file():
        return TaskTargets(folder, dtype)
    others = {place.parent: StoredTeacher.read(place.parent) for place in sorted(store.glob(f"*/{TEACHER}"))}
    if fingerprint.revision is None:
        fitting = [
            place for place, other in others.items() if other.model == model and _but_revision(other, fingerprint)
        ]
        if len(fitting) == 1:
            return TaskTargets(fitting[0], dtype)
        if fitting:
            found = [others[place].fingerprint.revision for place in fitting]
            raise ConfigError(
                f"task '{task}': the hub cannot be asked for the revision of '{model}', and '{store}' holds {found}: "
                "set the teacher's 'revision' to one of these commits"
            )
    near = min(
        (other for other in others.values() if other.fingerprint.kind == fingerprint.kind),
        key=lambda other: len(fingerprint.differences(other.fingerprint)),
        default=None,
    )
    has = (
        f"targets of {sorted(other.fingerprint.kind for other in others.values())} teachers" if others else "no targets"
    )
    if near is not None:
        has = f"targets of another {fingerprint.kind} teacher ('{near.model}'): " + "; ".join(
            fingerprint.differences(near.fingerprint)
        )
    raise ConfigError(
        f"task '{task}': '{store}' has no targets of the teacher '{model}', but {has}. To add them: {remedy}"
    )


def _but_revision(other: StoredTeacher, fingerprint: Fingerprint) -> bool:
    return all(difference.startswith("revision ") for difference in fingerprint.differences(other.fingerprint))
