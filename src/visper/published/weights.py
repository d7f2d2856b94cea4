"""Weight files on disk, read and written one at a time, so that a checkpoint is never in memory as a whole."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from visper.common.errors import ConfigError

SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"
INDEX = ".index.json"
BESIDE_WEIGHTS = ["*.json", "*.jinja", "*.model", "*.txt"]


def fetch(source: str) -> Path:
    """The folder of a checkpoint: ``source`` itself, or the hub's repository of that id, downloaded.

    Of a repository only weights, configuration and tokenizer are taken, pickled weights only if there are no others.

    Raises:
        ConfigError: ``source`` is neither a folder nor an id that can be reached.
    """
    if Path(source).is_dir():
        return Path(source)
    try:
        folder = Path(snapshot_download(source, allow_patterns=[*BESIDE_WEIGHTS, "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(source, allow_patterns=["*.bin"])
    except (OSError, HFValidationError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"'{source}' is not a folder, and as a hub id it cannot be reached: {reason} Check the spelling and the "
            f"network, or run `hf download {source}` where there is one and give the folder it made"
        ) from error
    return folder


@dataclass(frozen=True)
class Weights:
    """The weight files of a folder and what they hold."""

    files: tuple[Path, ...]
    shapes: Mapping[str, tuple[int, ...]]
    where: Mapping[str, Path]

    @classmethod
    def of(cls, folder: Path) -> Weights:
        """Reads names and shapes only; safetensors where there are both kinds.

        Raises:
            ConfigError: no weights, a shard that is missing, a file that cannot be read.
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
        """The ``wanted`` tensors of one file, mapped from disk where its format allows."""
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                for name in wanted:
                    yield name, opened.get_tensor(name)
        else:
            state = _unpickled(file)
            for name in wanted:
                yield name, state[name]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Chosen tensors, wherever they lie; those that are not there are left out."""
        wanted = [name for name in names if name in self.where]
        found: dict[str, Tensor] = {}
        for file in {self.where[name]: None for name in wanted}:
            found.update(self.tensors(file, [name for name in wanted if self.where[name] == file]))
        return found


def _files(folder: Path) -> tuple[Path, ...]:
    for name in (SAFETENSORS, PICKLED):
        index = folder / (name + INDEX)
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
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
        f"'{folder}' holds no weights: expected {SAFETENSORS} or {PICKLED}, whole or as shards with their {INDEX} file"
    )


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
        # Only the zip format can be mapped; weights_only refuses code in the file.
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        # Without torch's own text: it advises to load the file with weights_only=False, which runs the code in it.
        raise ConfigError(
            f"'{file}' cannot be read as plain tensors ({type(error).__name__}): it may be cut short, or contain code, "
            "which is never run. Download it again, or take the checkpoint's safetensors"
        ) from None
    strange = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if strange:
        raise ConfigError(f"'{file}' holds more than tensors: {', '.join(strange[:5])}. Expected a model's state dict")
    return dict(state)


class ShardWriter:
    """Writes ``model.safetensors``, or ``total`` shards of it and their index, as transformers reads them."""

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
        """Writes the index, where there is more than one shard."""
        assert self._written == self.total, f"{self._written} of {self.total} shards written"
        if self.total > 1:
            index = {"metadata": {"total_size": self.bytes}, "weight_map": dict(sorted(self.weight_map.items()))}
            (self.folder / (SAFETENSORS + INDEX)).write_text(json.dumps(index, indent=1), encoding="utf-8")
