"""Reads and writes weight files one at a time, so that a full checkpoint is never in memory."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from visper.common.errors import ConfigError, first_line
from visper.common.files import read_json_object
from visper.data.sets.origins import HUB_ERRORS

SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"
INDEX = ".index.json"
BESIDE_WEIGHTS = ["*.json", "*.jinja", "*.model", "*.txt"]


def fetch(source: str) -> Path:
    """The folder of a checkpoint: ``source`` itself, or a download of the hub repository with that id.

    Only weights, configuration and tokenizer are downloaded; pickled weights only if there are no safetensors.

    Raises:
        ConfigError: ``source`` is neither a folder nor an id that can be reached.
    """
    if Path(source).is_dir():
        return Path(source)
    try:
        folder = Path(snapshot_download(source, allow_patterns=[*BESIDE_WEIGHTS, "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(source, allow_patterns=["*.bin"])
    except HUB_ERRORS as error:  # also in the middle of a download
        raise ConfigError(
            f"'{source}' is not a folder, and as a hub id it cannot be reached: {first_line(error)} Check the spelling "
            f"and the network, or run `hf download {source}` on a machine with a network and give the downloaded folder"
        ) from error
    return folder


@dataclass(frozen=True)
class Weights:
    """The weight files of a folder, and the shape and file of each tensor."""

    files: tuple[Path, ...]
    shapes: Mapping[str, tuple[int, ...]]
    where: Mapping[str, Path]

    @classmethod
    def of(cls, folder: Path) -> Weights:
        """Reads names and shapes only. Safetensors are preferred to pickled weights.

        Raises:
            ConfigError: there are no weights, a shard is missing, or a file cannot be read.
        """
        files = _files(folder)
        shapes: dict[str, tuple[int, ...]] = {}
        where: dict[str, Path] = {}
        for file in files:
            for name, shape in _shapes(file):
                shapes[name] = shape
                where[name] = file
        return cls(files, shapes, where)

    def tensors(self, file: Path, wanted: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The ``wanted`` tensors of one file, memory-mapped if its format allows it."""
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                for name in wanted:
                    yield name, opened.get_tensor(name)
        else:
            state = _unpickled(file)
            for name in wanted:
                yield name, state[name]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors with these names, from all files; missing ones are left out."""
        wanted = [name for name in names if name in self.where]
        found: dict[str, Tensor] = {}
        for file in {self.where[name]: None for name in wanted}:
            found.update(self.tensors(file, [name for name in wanted if self.where[name] == file]))
        return found


def _files(folder: Path) -> tuple[Path, ...]:
    for name in (SAFETENSORS, PICKLED):
        index = folder / (name + INDEX)
        if index.is_file():
            shards = _shards(index)
            missing = [shard for shard in shards if not (folder / shard).is_file()]
            if missing:
                raise ConfigError(
                    f"'{folder}' lacks {len(missing)} of the {len(shards)} files that {index.name} names: "
                    f"{', '.join(missing)}. Download them again"
                )
            return tuple(folder / shard for shard in shards)
        if (folder / name).is_file():
            return (folder / name,)
    raise ConfigError(
        f"'{folder}' has no weights: expected {SAFETENSORS} or {PICKLED}, or shards of one of them with an {INDEX} file"
    )


def _shards(index: Path) -> list[str]:
    weight_map = read_json_object(index).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"'{index}' has no 'weight_map' from tensors to files: download it again")
    return sorted(set(names))


def _shapes(file: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    if file.suffix != ".safetensors":
        yield from ((name, tuple(tensor.shape)) for name, tensor in _unpickled(file).items())
        return
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                yield name, tuple(opened.get_slice(name).get_shape())
    except SafetensorError as error:
        raise ConfigError(f"'{file}' cannot be read ({error}): it may be cut short, download it again") from error


def _unpickled(file: Path) -> dict[str, Tensor]:
    try:
        # Only the zip format can be memory-mapped; weights_only refuses code in the file.
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        # torch's own message is left out: it suggests weights_only=False, which would run code in the file.
        raise ConfigError(
            f"'{file}' cannot be read as plain tensors ({type(error).__name__}): it may be cut short, or contain code, "
            "which is never run. Download it again, or use the checkpoint's safetensors"
        ) from None
    strange = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if strange:
        raise ConfigError(f"'{file}' holds more than tensors: {', '.join(strange[:5])}. Expected a model's state dict")
    return dict(state)


class ShardWriter:
    """Writes ``model.safetensors``, or ``total`` shards and their index, in the layout that transformers reads."""

    def __init__(self, folder: Path, total: int) -> None:
        self.folder = folder
        self.total = total
        self.bytes = 0
        self.weight_map: dict[str, str] = {}
        self._written = 0

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Writes the next shard."""
        self._written += 1
        name = SAFETENSORS
        if self.total > 1:
            name = f"model-{self._written:05d}-of-{self.total:05d}.safetensors"
        save_file({n: t.contiguous() for n, t in tensors.items()}, self.folder / name, metadata={"format": "pt"})
        self.weight_map |= dict.fromkeys(tensors, name)
        self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def finish(self) -> None:
        """Writes the index, if there is more than one shard."""
        assert self._written == self.total, f"{self._written} of {self.total} shards written"
        if self.total > 1:
            index = {"metadata": {"total_size": self.bytes}, "weight_map": dict(sorted(self.weight_map.items()))}
            (self.folder / (SAFETENSORS + INDEX)).write_text(json.dumps(index, indent=1), encoding="utf-8")
