"""Measures the layers' predictions on held-out scenes, each figure beside its controls.

The held-out scenes are halved: the controls (mean target, mean depth map, most frequent class at each pixel) come from
the first half, and predictions are judged on the second.

Shape suffixes: S = scenes, N = tokens, E = width, H, W = pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from visper.distillation.alignment import pooled
from visper.evaluation.probe.measures import TEACHER, Finding, centered_cosine
from visper.quickstart.objective import Source
from visper.quickstart.tower import TowerTeacher


@dataclass(frozen=True)
class HeldOut:
    """Held-out scenes: images and exact maps (depth in meters, classes), in the same order."""

    images: list[Image.Image]
    depth: Tensor  # [S, H, W] meters
    classes: Tensor  # [S, H, W]
    objects: Tensor  # [S, H, W], True on named objects

    @classmethod
    def read(cls, world: Path, limit: int) -> HeldOut:
        """The first ``limit`` held-out scenes of a world."""
        with np.load(world / "held_out.npz") as arrays:
            names = [str(name) for name in arrays["images"][:limit]]
            depth = torch.from_numpy(arrays["depth"][:limit].astype(np.float32))
            classes = torch.from_numpy(arrays["classes"][:limit].astype(np.int64))
            objects = torch.from_numpy(arrays["instances"][:limit] > 0)
        images = []
        for name in names:
            with Image.open(world / "images" / name) as file:
                images.append(file.convert("RGB"))
        return cls(images, depth, classes, objects)

    def part(self, start: int, stop: int) -> HeldOut:
        """The scenes from ``start`` up to, not including, ``stop``."""
        cut = slice(start, stop)
        return HeldOut(self.images[cut], self.depth[cut], self.classes[cut], self.objects[cut])


def findings(
    predicted: Mapping[str, Tensor],
    sources: Mapping[str, Source],
    teachers: Mapping[str, TowerTeacher],
    fit: HeldOut,
    judged: HeldOut,
) -> list[Finding]:
    """The findings of every tapped layer.

    Args:
        predicted: predictions for the judged scenes, in their order, by "task/layer".
        sources: functions that give the targets, by task.
        teachers: teachers that decode targets, by task.
        fit, judged: the two halves of the held-out scenes, see the top of this module.
    """
    found = []
    tasks = dict.fromkeys(name.split("/")[0] for name in predicted)
    targets = {task: (sources[task](fit.images), sources[task](judged.images)) for task in tasks}
    for name, values in predicted.items():
        task = name.split("/")[0]
        tokens = values.shape[1]
        fitted_SNE, target_SNE = targets[task]
        mean_NE = pooled(fitted_SNE, tokens).mean(0)
        shuffled = pooled(target_SNE.roll(len(target_SNE) // 2, dims=0), tokens)
        cosine = float(centered_cosine(values, pooled(target_SNE, tokens), mean_NE).mean())
        control = {"another scene's target": float(centered_cosine(values, shuffled, mean_NE).mean())}
        found.append(Finding(name, "cosine without the mean target", cosine, control, True))
        if task in teachers and values.shape == target_SNE.shape:
            found.extend(_drawn(name, teachers[task], values, target_SNE, fit, judged))
    return found


def _drawn(
    name: str, teacher: TowerTeacher, values: Tensor, target: Tensor, fit: HeldOut, judged: HeldOut
) -> list[Finding]:
    """Compares decoded predictions with the exact maps; empty if the teacher's output is not a map."""
    head = teacher.model.config.head
    ours, ceiling = teacher.decode_values(values), teacher.decode_values(target)
    on = judged.objects
    if head == "depth":
        mean_map = fit.depth.log().mean(0).exp().expand_as(judged.depth)
        result = []
        for where, mask in (("image", torch.ones_like(on)), ("objects", on)):
            error = [_relative_error(d, judged.depth, mask) for d in (ours[:, 0], mean_map, ceiling[:, 0])]
            controls = {"mean map": error[1], TEACHER: error[2]}
            result.append(Finding(name, f"depth error, {where}", error[0], controls, False))
        return result
    if head == "classes":
        counts = F.one_hot(fit.classes).sum(0)
        by_position = counts.argmax(-1).expand_as(judged.classes)
        # On object pixels, guess the most frequent *object* class at each position: the strongest blind guess.
        object_counts = (F.one_hot(fit.classes) * fit.objects[..., None]).sum(0)
        on_objects = object_counts.argmax(-1).expand_as(judged.classes)
        result = []
        for where, mask, guess in (("image", torch.ones_like(on), by_position), ("objects", on, on_objects)):
            right = [
                float((classes == judged.classes)[mask].float().mean())
                for classes in (ours.argmax(1), guess, ceiling.argmax(1))
            ]
            controls = {"guess by position": right[1], TEACHER: right[2]}
            result.append(Finding(name, f"pixels right, {where}", right[0], controls, True))
        return result
    return []


def _relative_error(depth: Tensor, exact: Tensor, mask: Tensor) -> float:
    return float(((depth - exact).abs() / exact)[mask].mean())
