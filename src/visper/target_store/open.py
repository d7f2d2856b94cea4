"""Opens a run's stored targets for training, and checks before the first step that no image lacks one."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from visper.common.console import track
from visper.common.errors import ConfigError, DataError
from visper.common.ranks import first_decides
from visper.config import Distillation
from visper.data.checks.digests import digest, digests_of
from visper.data.rows.records import Record
from visper.data.rows.table import Records
from visper.distillation.teachers.base import Teacher
from visper.target_store.fingerprint import Fingerprint, fingerprints
from visper.target_store.quantize import TargetCodec
from visper.target_store.store import TEACHER, StoredTeacher, TaskTargets, folder_of, is_damaged, read_dtype


class DecodedTargets(Teacher):
    """Replaces a teacher in training: decodes packed targets ``[B, target_bytes]`` to targets ``[B, N, E]``."""

    def __init__(self, codec: TargetCodec) -> None:
        super().__init__()
        self.codec, self.spec = codec, codec.spec
        self.freeze()

    def encode(self, pixels: Tensor) -> Tensor:
        """``[B, N, E]`` float32."""
        return self.codec.decode(pixels)

    def decode(self, embedding: Tensor, pixels: Tensor | None = None, reference: Tensor | None = None) -> Tensor:
        """Raises ValueError: only the teacher itself can draw."""
        raise ValueError("stored targets cannot be drawn: build the teacher (visper.distillation.build_teacher)")


@dataclass(frozen=True)
class TargetStore:
    """The stored targets of a run's tasks. ``remedy`` is the command that computes missing ones, for messages."""

    tasks: Mapping[str, TaskTargets]
    remedy: str

    def teachers(self) -> dict[str, Teacher]:
        """Task -> the module that training uses in place of its teacher."""
        return {task: DecodedTargets(targets.codec) for task, targets in self.tasks.items()}

    def lookup(self, content: bytes) -> dict[str, Tensor]:
        """Task -> the packed target ``[target_bytes]`` uint8 of the image whose file has this content.

        Raises:
            DataError: the target is damaged, or not in the store (the image is new or was changed).
        """
        own = digest(content)
        found = {}
        for task, targets in self.tasks.items():
            packed = targets.read(own)
            if packed is None:
                raise DataError(
                    "no stored target",
                    f"task '{task}': '{targets.folder}' has no target for an image of this content (sha256 "
                    f"{own.hex()}...), which is new or was changed: run {self.remedy}",
                )
            found[task] = packed
        return found

    def missing(self, digests: Iterable[bytes]) -> dict[str, list[bytes]]:
        """Task -> those of these images that the store lacks; tasks that lack none are left out."""
        wanted = list(dict.fromkeys(digests))
        missing = {task: targets.missing(wanted) for task, targets in self.tasks.items()}
        return {task: lost for task, lost in missing.items() if lost}


def open_targets(
    distillation: Distillation | None,
    geometry: str,
    background: tuple[int, int, int],
    store: Path | None = None,
    arguments: Sequence[str] | None = None,
) -> TargetStore | None:
    """Opens the store that the run names (``distillation.targets``), or ``store``; None if the run uses its teachers.

    Args:
        background: the RGB color that ``pad`` puts around an image.
        arguments: see ``build_command``.

    Raises:
        ConfigError: the folder is not a store, or it lacks the targets of one of the run's teachers.
    """
    place = store or (Path(distillation.targets) if distillation and distillation.targets else None)
    if distillation is None or place is None:
        return None
    remedy = build_command(place, arguments)
    dtype = _require_store(place, remedy)
    found = {}
    for task, fingerprint in fingerprints(distillation.tasks, geometry, background).items():
        folder = find_folder(place, task, fingerprint, distillation.tasks[task].target.place, remedy)
        found[task] = TaskTargets(folder, dtype)
        wanted, has = distillation.teacher_dtype, found[task].teacher.precision
        if wanted not in (None, has):
            raise ConfigError(
                f"task '{task}': the targets in '{folder}' were computed in {has}, but distillation.teacher_dtype "
                f"is {wanted}: leave it out, or build another store"
            )
    return TargetStore(found, remedy)


def damaged_parts(
    distillation: Distillation, geometry: str, background: tuple[int, int, int], store: Path, remedy: str
) -> Iterator[Path]:
    """The parts of the run's teachers that cannot be read or contain a target that does not match its checksum.

    Every part is read completely. Arguments as in ``open_targets``.

    Raises:
        ConfigError: ``store`` is not a store, or has no targets of one of the run's teachers.
    """
    dtype = _require_store(store, remedy)
    parts = []
    for task, fingerprint in fingerprints(distillation.tasks, geometry, background).items():
        folder = find_folder(store, task, fingerprint, distillation.tasks[task].target.place, remedy)
        codec = TargetCodec(StoredTeacher.read(folder).spec, dtype)
        parts += [(part, codec) for part in sorted(folder.glob("*.safetensors"))]
    for part, codec in track(parts, description="verifying checksums"):
        if is_damaged(part, codec):
            yield part


def _require_store(place: Path, remedy: str) -> str:
    dtype = read_dtype(place)
    if dtype is None:
        raise ConfigError(f"there is no target store at '{place}': run {remedy}")
    return dtype


def build_command(store: Path, arguments: Sequence[str] | None = None) -> str:
    """The command that computes missing targets, for messages.

    Args:
        arguments: the recipe and the overrides, as they were given on the command line; None: they are not known.
    """
    if arguments is None:
        return f"`visper targets build RUN.yaml --out {shlex.quote(str(store))}` with the run's overrides"
    return f"`{shlex.join(['visper', 'targets', 'build', *arguments, '--out', str(store)])}`"


def find_folder(store: Path, task: str, fingerprint: Fingerprint, model: str, remedy: str) -> Path:
    """The folder of a teacher's targets.

    Args:
        task: name of the task, for messages.
        fingerprint: the teacher's; if its revision is unknown, the store's only targets of ``model`` are used.
        remedy: the command that builds missing targets, for messages.

    Raises:
        ConfigError: the store has no such targets; the message says what it has instead.
    """
    folder = folder_of(store, fingerprint)
    if (folder / TEACHER).is_file():
        return folder
    others = {place.parent: StoredTeacher.read(place.parent) for place in sorted(store.glob(f"*/{TEACHER}"))}
    if fingerprint.revision is None:
        fitting = [p for p, other in others.items() if other.model == model and _same_but_revision(other, fingerprint)]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            found = [others[place].fingerprint.revision for place in fitting]
            raise ConfigError(
                f"task '{task}': the revision of '{model}' cannot be read from the hub, and '{store}' has targets of "
                f"{found}: set the teacher's 'revision' to one of these commits"
            )
    same_kind = [other for other in others.values() if other.fingerprint.kind == fingerprint.kind]
    near = min(same_kind, key=lambda other: len(fingerprint.differences(other.fingerprint)), default=None)
    if near is not None:
        differences = "; ".join(fingerprint.differences(near.fingerprint))
        has = f", but targets of another {fingerprint.kind} teacher ('{near.model}'): {differences}"
    elif others:
        has = f", but targets of {sorted(other.fingerprint.kind for other in others.values())} teachers"
    else:
        has = ""
    raise ConfigError(f"task '{task}': '{store}' has no targets of the teacher '{model}'{has}. To add them: {remedy}")


def _same_but_revision(other: StoredTeacher, fingerprint: Fingerprint) -> bool:
    return all(difference.startswith("revision ") for difference in fingerprint.differences(other.fingerprint))


def require_targets(store: TargetStore, records: Sequence[Record], quiet: bool = True) -> None:
    """Raises DataError, on every rank, if images of the rows have no stored targets.

    The first process looks up the hash of each image file; hashes are cached until a file changes. Images in Parquet
    files are not checked: a missing target drops its row when it is read, and ``data.drop_limit`` counts it. The
    message has the number of these images, the first one, and the command that computes their targets.
    """
    if isinstance(records, Records):
        first_decides(lambda: _require_images(store, records, quiet))


def _require_images(store: TargetStore, records: Records, quiet: bool) -> None:
    in_files = np.unique(np.fromiter((row for row, *_ in records.image_files()), dtype=np.int64))
    records = records.select(in_files)
    digests = digests_of(records, quiet) if len(records) else {}
    missing = store.missing(own for own in digests.values() if own is not None)
    if not missing:
        return
    task, lost = next(iter(missing.items()))
    row, number = next(place for place, own in digests.items() if own == lost[0])
    first = records[row].images[number].path
    counts = ", ".join(f"{len(own)} images of task '{name}'" for name, own in missing.items())
    raise DataError(
        "no stored target",
        f"{counts} are not in '{store.tasks[task].folder.parent}', the first is '{first}', which is new or was "
        f"changed: run {store.remedy}",
    )
