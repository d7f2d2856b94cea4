"""Format of a target store: targets in memory-mapped safetensors files, looked up by the content of the image file.

Layout::

    store.json                       the format and the dtype of all targets
    depth_anything-0f3a.../          one folder per teacher; the name ends with the key of its fingerprint
        teacher.json                 fingerprint, shape and precision of these targets
        5b2e....safetensors          a part, named after the images it covers: targets [n, N, E], their scales and
                                     checksums [n]; digests [n, 16] of the images, and of images that cannot be decoded;
                                     the name of its folder, since another teacher's part may have its name and shapes

A part is complete or absent. A target is looked up by the digest of the image's encoded bytes, in the folder of its
teacher's fingerprint: for a changed image or teacher none is found, whatever its name.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Sequence
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
from visper.data.checks.digests import DIGEST_BYTES
from visper.distillation.teachers.base import TargetSpec
from visper.target_store.fingerprint import Fingerprint
from visper.target_store.quantize import DTYPES, TargetCodec

FORMAT = "visper-targets-3"
STORE, TEACHER = "store.json", "teacher.json"
_UNREADABLE = -1


def write_part(
    folder: Path, codec: TargetCodec, digests: Sequence[bytes], packed: Sequence[Tensor | None], name: str
) -> None:
    """Writes one part, completely or not at all.

    Args:
        packed: each image's target ``[target_bytes]`` (``TargetCodec.pack``); None: the image cannot be decoded.
    """
    good = [(own, target) for own, target in zip(digests, packed, strict=True) if target is not None]
    stored = [target for _, target in good]
    empty = torch.empty(0, codec.target_bytes, dtype=torch.uint8)
    values, scales = codec.unpack(torch.stack(stored) if stored else empty)
    tensors = {
        "targets": values,
        "checksums": torch.tensor([_checksum(one) for one in stored], dtype=torch.int64),
        "digests": _as_tensor([own for own, _ in good]),
        "unreadable": _as_tensor([own for own, target in zip(digests, packed, strict=True) if target is None]),
    }
    if scales is not None:
        tensors["scales"] = scales
    with atomic_path(folder / f"{name}.safetensors") as partial:
        save_file(tensors, partial, metadata={"format": _format_in(folder)})
        # safetensors makes files that only their owner can read: give them the JSON files' mode, for shared stores.
        partial.chmod((folder / TEACHER).stat().st_mode & 0o777)


def _format_in(folder: Path) -> str:
    """What a part in a teacher's folder says of itself, as one value: safetensors writes several in random order."""
    return f"{FORMAT} of {folder.name}"


def _as_tensor(digests: list[bytes]) -> Tensor:
    flat = np.frombuffer(b"".join(digests), dtype=np.uint8).copy()
    return torch.from_numpy(flat).view(-1, DIGEST_BYTES)


def _checksum(packed: Tensor) -> int:
    return zlib.crc32(packed.numpy().data)


@dataclass(frozen=True)
class StoredTeacher:
    """Content of a teacher's ``teacher.json``; ``model`` and ``versions`` are for information only."""

    fingerprint: Fingerprint
    spec: TargetSpec
    precision: str
    model: str
    versions: dict[str, str]

    @classmethod
    def read(cls, folder: Path) -> StoredTeacher:
        """Raises ConfigError if the folder is not a teacher's."""
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
            raise ConfigError(
                f"'{folder / TEACHER}' cannot be read ({error}): expected the description of a teacher in a target "
                "store; remove the folder and build the targets again"
            ) from error

    def write(self, folder: Path) -> None:
        """Writes ``teacher.json``, completely or not at all."""
        write_text(folder / TEACHER, json.dumps(asdict(self), indent=1) + "\n")


class TaskTargets:
    """One teacher's targets in a store, memory-mapped. Pickles as its path: another process maps the files again.

    Raises:
        ConfigError: a file in the folder has another format, or is damaged.
    """

    def __init__(self, folder: Path, dtype: str) -> None:
        self.folder = folder
        self.teacher = StoredTeacher.read(folder)
        self.codec = TargetCodec(self.teacher.spec, dtype)
        self.parts = sorted(folder.glob("*.safetensors"))
        self._open: dict[int, Any] = {}
        digests, places = [np.zeros(0, f"S{DIGEST_BYTES}")], [np.zeros((0, 2), np.int32)]
        for number in range(len(self.parts)):
            for name in ("digests", "unreadable"):
                own = self._part(number).get_tensor(name).numpy().reshape(-1).view(f"S{DIGEST_BYTES}")
                rows = np.arange(len(own)) if name == "digests" else np.full(len(own), _UNREADABLE)
                digests.append(own)
                places.append(np.stack((np.full(len(own), number), rows), 1).astype(np.int32))
            self._open.pop(number)  # a process may need only a few of thousands of parts
        everything = np.concatenate(digests)
        order = np.argsort(everything, kind="stable")
        self._digests, self._places = everything[order], np.concatenate(places)[order]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.folder, self.codec.dtype)

    def __len__(self) -> int:
        return len(self._digests)

    def missing(self, digests: Sequence[bytes]) -> list[bytes]:
        """Those of these images that were neither computed nor found to be undecodable."""
        rows = self._rows(np.asarray(digests, dtype=self._digests.dtype))
        return [own for own, row in zip(digests, rows, strict=True) if row < 0]

    def read(self, image: bytes) -> Tensor | None:
        """The packed target ``[target_bytes]`` uint8 of the image with this digest; None if there is none.

        Raises:
            DataError: its bytes do not match their checksum.
        """
        row = int(self._rows(np.asarray([image], dtype=self._digests.dtype))[0])
        if row < 0 or self._places[row, 1] == _UNREADABLE:
            return None
        number, at = self._places[row].tolist()
        part = self._part(number)
        packed = _read_row(part, self.codec, at)
        if _checksum(packed) != int(part.get_slice("checksums")[at]):
            raise DataError(
                "damaged target",
                f"target {at} in '{self.parts[number]}' does not match its checksum: remove the file and build the "
                "targets again; `visper targets check` lists all damaged files",
            )
        return packed

    def _rows(self, digests: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.int64]]:
        if not len(self._digests):
            return np.full(len(digests), -1)
        rows = np.searchsorted(self._digests, digests).clip(max=len(self._digests) - 1)
        return np.where(self._digests[rows] == digests, rows, -1)

    def _part(self, number: int) -> Any:
        if number not in self._open:
            self._open[number] = open_part(self.parts[number], self.codec)
        return self._open[number]


def open_part(file: Path, codec: TargetCodec) -> Any:
    """A part, memory-mapped.

    Raises:
        ConfigError: it is cut short or otherwise damaged, has another format, or belongs to another teacher.
    """
    again = "remove the file and build the targets again"
    try:
        part = safe_open(file, "pt")
        found = (part.metadata() or {}).get("format")
        targets = part.get_slice("targets")
        shape, rows = targets.get_shape(), part.get_slice("checksums").get_shape()[0]
        kind = part.get_slice("targets")[:0].dtype
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"'{file}' cannot be read: {error}; {again}") from error
    if found != _format_in(file.parent):
        raise ConfigError(f"'{file}' has the format {found!r}, expected {_format_in(file.parent)!r}: {again}")
    expected = [rows, codec.spec.tokens, codec.spec.width]
    if shape != expected or kind != DTYPES[codec.dtype]:
        raise ConfigError(f"'{file}' holds targets {shape} {kind}, expected {expected} {codec.dtype}: {again}")
    return part


def is_damaged(file: Path, codec: TargetCodec) -> bool:
    """Whether a part cannot be read, or a target in it does not match its checksum. Reads the part completely."""
    try:
        part = open_part(file, codec)
        checksums = part.get_tensor("checksums").tolist()
        return any(_checksum(_read_row(part, codec, at)) != checksum for at, checksum in enumerate(checksums))
    except (ConfigError, SafetensorError):
        return True


def _read_row(part: Any, codec: TargetCodec, at: int) -> Tensor:
    scales = part.get_slice("scales")[at] if codec.scales[0] else None
    return codec.join(part.get_slice("targets")[at], scales)


def read_dtype(store: Path) -> str | None:
    """The dtype of a store; None if there is no store yet.

    Raises:
        ConfigError: it has another format.
    """
    try:
        found = json.loads((store / STORE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"'{store / STORE}' cannot be read: {error}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ConfigError(f"'{store}' is not a target store of the format {FORMAT!r}: choose another folder")
    return str(found["dtype"])


def claim_store(store: Path, dtype: str) -> None:
    """Creates a store of ``dtype``; does nothing if ``store`` is one already. One without targets takes the new dtype.

    Raises:
        ConfigError: it has targets of another dtype, or the folder holds something else.
    """
    found = read_dtype(store)
    if found == dtype:
        return
    if found is not None and any(store.glob("*/*.safetensors")):
        raise ConfigError(f"'{store}' has targets in {found}, not {dtype}: choose another folder, or --dtype {found}")
    others = [file.name for file in store.iterdir() if not file.name.startswith(".")] if store.exists() else []
    if found is None and others:
        raise ConfigError(f"'{store}' has files such as {others[:3]} and no target store: choose a new folder")
    write_text(store / STORE, json.dumps({"format": FORMAT, "dtype": dtype}) + "\n")


def folder_of(store: Path, fingerprint: Fingerprint) -> Path:
    """The folder of a teacher's targets in a store."""
    return store / f"{re.sub(r'[^A-Za-z0-9]+', '_', fingerprint.kind)}-{fingerprint.key}"
