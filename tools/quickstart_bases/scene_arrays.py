"""Scenes as arrays, for the training of the encoders, the LLM and the teachers. Mirroring doubles them."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tools.quickstart_bases.patches import patch_labels
from visper.quickstart.scenes import GRID, SceneObject, draw_scene

_PATCH_KEYS = ("color", "shape", "center", "depth")


@dataclass
class SceneArrays:
    """Many scenes as arrays.

    Attributes:
        images: [S,96,96,3] uint8.
        depths: [S,96,96] float16, in meters.
        classes: [S,96,96] uint8.
        patches: patch labels by name, [S,P].
        objects: the named objects of each scene.
    """

    images: npt.NDArray[np.uint8]
    depths: npt.NDArray[np.float16]
    classes: npt.NDArray[np.uint8]
    patches: dict[str, npt.NDArray[np.generic]]
    objects: list[tuple[SceneObject, ...]]

    def __len__(self) -> int:
        return len(self.images)

    def indices(self, rng: np.random.Generator, size: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        return rng.integers(0, len(self), size), rng.random(size) < 0.5

    def batch(self, rng: np.random.Generator, size: int) -> tuple[npt.NDArray[np.uint8], dict[str, Tensor]]:
        """Random images and their patch labels, half of them mirrored."""
        rows, mirror = self.indices(rng, size)
        images = self.images[rows]
        images[mirror] = images[mirror][:, :, ::-1]
        return images, {k: self._labels(k, rows, mirror) for k in _PATCH_KEYS}

    def maps(self, rng: np.random.Generator, size: int) -> tuple[npt.NDArray[np.uint8], Tensor, Tensor]:
        """Random images, depths [B,96,96] float32 meters, classes [B,96,96] long, half of them mirrored."""
        rows, mirror = self.indices(rng, size)
        parts: list[npt.NDArray[Any]] = [
            self.images[rows],
            self.depths[rows].astype(np.float32),
            self.classes[rows].astype(np.int64),
        ]
        for part in parts:
            part[mirror] = part[mirror][:, :, ::-1]
        return parts[0], torch.from_numpy(parts[1]), torch.from_numpy(parts[2])

    def in_order(
        self, size: int, limit: int | None = None
    ) -> Iterator[tuple[npt.NDArray[np.uint8], dict[str, Tensor]]]:
        for start in range(0, min(limit or len(self), len(self)), size):
            rows = np.arange(start, min(start + size, limit or len(self), len(self)))
            yield self.images[rows], {k: self._labels(k, rows, np.zeros(len(rows), bool)) for k in _PATCH_KEYS}

    def _labels(self, key: str, rows: npt.NDArray[np.int64], mirror: npt.NDArray[np.bool_]) -> Tensor:
        values = self.patches[key][rows].reshape(-1, GRID, GRID).copy()
        values[mirror] = values[mirror][:, :, ::-1]
        flat = torch.from_numpy(values.reshape(-1, GRID * GRID))
        return flat.long() if key in ("color", "shape") else flat.float()


def draw_scene_arrays(seed: int, count: int, cache: Path | None = None) -> SceneArrays:
    """Renders ``count`` scenes of the series ``seed``, or reads them from ``cache`` if it exists."""
    if cache is not None and cache.exists():
        with cache.open("rb") as file:
            arrays = pickle.load(file)
        if isinstance(arrays, SceneArrays) and len(arrays) == count:
            return arrays
    scenes, labels = [], []
    for index in range(count):
        scene = draw_scene(seed, index)
        scenes.append(scene)
        labels.append(patch_labels(scene))
        if (index + 1) % 500 == 0:
            print(f"scenes of seed {seed}: {index + 1}/{count}", file=sys.stderr, flush=True)
    arrays = SceneArrays(
        np.stack([s.image for s in scenes]),
        np.stack([s.depth for s in scenes]).astype(np.float16),
        np.stack([s.classes for s in scenes]),
        {k: np.stack([getattr(one, k) for one in labels]) for k in _PATCH_KEYS},
        [s.objects for s in scenes],
    )
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        beside = cache.with_suffix(".part")
        with beside.open("wb") as file:
            pickle.dump(arrays, file, protocol=5)
        beside.replace(cache)
    return arrays
