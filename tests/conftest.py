"""What tests share: one thread, the golden fixtures, and material outside the project.

Tests that need such material skip where it is absent.
"""

import gc
import gzip
import importlib.util
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny

PROJECT_GOLDEN = Path(__file__).parent / "golden"
BESIDE_PROJECT = Path(__file__).resolve().parents[2] / "shared"

torch.set_num_threads(1)


def outside(*parts: str, variable: str | None = None) -> Path:
    """A path beside the project, or under ``$variable``; the test skips where it is absent."""
    given = os.environ.get(variable) if variable else None
    path = Path(given, *parts[1:]) if given else BESIDE_PROJECT.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{'/'.join(parts)} is not here" + (f": set ${variable} to its folder" if variable else ""))
    return path


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps what tests cache out of the material beside the project."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VISPER_CACHE", str(tmp_path_factory.mktemp("cache")))
        folder = tmp_path_factory.mktemp("datasets")
        patch.setenv("HF_DATASETS_CACHE", str(folder))  # for started processes
        if importlib.util.find_spec("datasets") is not None:  # not where gpu_check.py runs
            import datasets

            patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        yield


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves nightly tests out of every run that does not ask for them, whatever its ``-m`` says."""
    if "nightly" not in config.option.markexpr:
        nightly = [item for item in items if item.get_closest_marker("nightly")]
        config.hook.pytest_deselected(items=nightly)
        items[:] = [item for item in items if item not in nightly]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Leaves what the imports made out of garbage collections: the Trainer calls one after each training, which would
    look at half a million objects of torch and transformers, a quarter of a tiny training's time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Gives them back, or libraries call them leaked when the process ends."""
    gc.unfreeze()


class Golden:
    """Golden fixtures: ``tests/golden`` (see its README), or the set in the folder that ``$VISPER_GOLDEN`` names."""

    def __call__(self, name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """The ``config`` and the tensors of one fixture."""
        config = json.loads(self.path(f"{name}.json").read_text(encoding="utf-8"))["config"]
        return config, load_file(self.path(f"{name}.safetensors"))

    @staticmethod
    def path(name: str) -> Path:
        """A file or folder of the set. A set without it is an error: nothing is skipped silently."""
        folder = Path(os.environ.get("VISPER_GOLDEN") or PROJECT_GOLDEN)
        if not (folder / name).exists():
            raise FileNotFoundError(f"{folder} has no {name}: unset VISPER_GOLDEN to use the project's fixtures")
        return folder / name

    def full_size(self, start: str) -> dict[str, list[int]]:
        """Parameter names and shapes of the published full-size checkpoint whose name starts with ``start``."""
        checkpoints = json.loads(gzip.decompress(self.path("g7_fullsize_keys.json.gz").read_bytes()))
        (found,) = (shapes for name, shapes in checkpoints.items() if name.startswith(start))
        return found

    @staticmethod
    def part(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
        """The tensors whose names start with ``prefix``, without it."""
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    @staticmethod
    def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
        """Largest difference, relative to the published tensor's largest value."""
        ours, theirs = ours.detach().float(), theirs.detach().float()
        return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-3))


@pytest.fixture(scope="session")
def golden() -> Golden:
    """Reads golden fixtures by name."""
    return Golden()


@pytest.fixture(scope="session")
def beside_project() -> Callable[..., Path]:
    """Gives the path of material beside the project; the test skips where it is absent."""
    return outside


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of four layers with a byte tokenizer and a chat template, as a folder."""
    return tiny.save_llm(tmp_path_factory.mktemp("llm"))


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP image encoder of 16 x 16 pixels and 16 patches, as a folder."""
    return tiny.save_encoder(tmp_path_factory.mktemp("encoder"))
