"""Labels of each patch of a scene, for the training of the encoder and the LLM.

Shape suffixes: P = the ``GRID`` x ``GRID`` patches, row by row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from visper.quickstart.scenes import COLORS, FAR, GRID, NEAR, PATCH, SHAPES, Scene

NO_COLOR = len(COLORS)
NO_SHAPE = len(SHAPES)
COVERED_SHARE = 0.2
"""A patch belongs to an object that fills at least this share of it."""


def log_depth(depth: npt.NDArray[np.floating[Any]] | float) -> npt.NDArray[np.float32]:
    """Converts depth in meters to 0 (``NEAR``) .. 1 (``FAR``) on a logarithmic scale."""
    clipped = np.clip(np.asarray(depth, np.float32), NEAR, FAR)
    return np.asarray(np.log(clipped / NEAR) / np.log(FAR / NEAR), np.float32)


@dataclass(frozen=True)
class PatchLabels:
    """Labels by patch: ``color`` [P] (8 = none), ``shape`` [P] (3 = none), ``center`` [P] bool, ``depth`` [P] in
    ``log_depth`` units.

    If an object is centered in a patch, color, shape and depth are that object's. Otherwise color and shape are those
    of the object that covers most of the patch, and depth is the patch's mean.
    """

    color: npt.NDArray[np.int64]
    shape: npt.NDArray[np.int64]
    center: npt.NDArray[np.bool_]
    depth: npt.NDArray[np.float32]


def patch_labels(scene: Scene) -> PatchLabels:
    def cut(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return array.reshape(GRID, PATCH, GRID, PATCH).transpose(0, 2, 1, 3).reshape(GRID * GRID, -1)

    instances, depths = cut(scene.instances), cut(log_depth(scene.depth))
    counts = np.stack([(instances == i + 1).sum(1) for i in range(len(scene.objects))], 1)
    owner = np.where(counts.max(1) >= COVERED_SHARE * PATCH * PATCH, counts.argmax(1), len(scene.objects))
    names = list(COLORS)
    colors = np.array([names.index(o.color) for o in scene.objects] + [NO_COLOR])
    shapes = np.array([SHAPES.index(o.shape) for o in scene.objects] + [NO_SHAPE])
    depth = depths.mean(1)
    center = np.zeros(GRID * GRID, bool)
    for index, thing in enumerate(scene.objects):
        column, row = thing.place
        patch = row * GRID + column
        center[patch], owner[patch] = True, index
        depth[patch] = log_depth(thing.depth)
    return PatchLabels(colors[owner], shapes[owner], center, depth.astype(np.float32))
