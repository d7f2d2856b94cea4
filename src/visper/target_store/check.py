"""Finds damaged files of a run's stored targets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from visper.common.console import track
from visper.common.errors import ConfigError
from visper.config import Distillation
from visper.target_store.fingerprint import fingerprints
from visper.target_store.open import find_folder
from visper.target_store.quantize import TargetCodec
from visper.target_store.store import StoredTeacher, is_damaged, read_dtype


def damaged_parts(
    distillation: Distillation,
    geometry: str,
    background: tuple[int, int, int],
    store: Path,
    remedy: str,
    quiet: bool = False,
) -> Iterator[Path]:
    """The parts of the run's teachers that cannot be read or contain a target that does not match its checksum.

    Every part is read completely. Arguments as in ``open_targets``.

    Raises:
        ConfigError: ``store`` is not a store, or has no targets of one of the run's teachers.
    """
    dtype = read_dtype(store)
    if dtype is None:
        raise ConfigError(f"there is no target store at '{store}': run {remedy}")
    parts = []
    for task, fingerprint in fingerprints(distillation.tasks, geometry, background).items():
        folder = find_folder(store, task, fingerprint, distillation.tasks[task].target.place, remedy)
        codec = TargetCodec(StoredTeacher.read(folder).spec, dtype)
        parts += [(part, codec) for part in sorted(folder.glob("*.safetensors"))]
    for part, codec in track(parts, description="verifying checksums", quiet=quiet):
        if is_damaged(part, codec):
            yield part
