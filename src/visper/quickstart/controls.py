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
from visper.evaluation.intervals import of_sums
from visper.evaluation.predictions import task_of
from visper.evaluation.probe.measures import OTHER_TARGET, TEACHER, Finding, centered_cosine
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
    def halves(cls, world: Path, judged: int) -> tuple[HeldOut, HeldOut]:
        """Two halves of a world's held-out scenes: ``judged`` scenes each, or fewer if the world has fewer."""
        limit = 2 * judged
        with np.load(world / "held_out.npz") as arrays:
            names = [str(name) for name in arrays["images"][:limit]]
            depth = torch.from_numpy(arrays["depth"][:limit].astype(np.float32))
            classes = torch.from_numpy(arrays["classes"][:limit].astype(np.int64))
            objects = torch.from_numpy(arrays["instances"][:limit] > 0)
        images = []
        for name in names:
            with Image.open(world / "images" / name) as file:
                images.append(file.convert("RGB"))
        half = len(images) // 2
        first, second = (
            cls(images[cut], depth[cut], classes[cut], objects[cut]) for cut in (slice(half), slice(half, 2 * half))
        )
        return first, second


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
        fit, judged: the two halves of the held-out scenes, see the top of this module.
    """
    found = []
    tasks = dict.fromkeys(map(task_of, predicted))
    targets = {task: (sources[task](fit.images), sources[task](judged.images)) for task in tasks}
    for name, values in predicted.items():
        task, tokens = task_of(name), values.shape[1]
        target_SNE = targets[task][1]
        ours, fitted, own = values, *(pooled(part, tokens) for part in targets[task])
        measure = "cosine without the mean target"
        if values.shape[2] != target_SNE.shape[2]:  # allowed under the loss gram, which compares only these matrices
            measure = "cosine of Gram matrices without the mean target's"
            ours, fitted, own = (unit @ unit.mT for unit in (F.normalize(part, dim=-1) for part in (ours, fitted, own)))
        other, mean = own.roll(len(own) // 2, dims=0), fitted.mean(0)
        cosines = [centered_cosine(ours, one, mean).tolist() for one in (own, other)]
        (cosine, interval), (control, _) = (of_sums(each, [1] * len(each)) for each in cosines)
        found.append(Finding(name, measure, cosine, {OTHER_TARGET: control}, True, interval))
        if task in teachers and values.shape == target_SNE.shape:
            found.extend(_drawn(name, teachers[task], values, target_SNE, fit, judged))
    return found


def _drawn(
    name: str, teacher: TowerTeacher, values: Tensor, target: Tensor, fit: HeldOut, judged: HeldOut
) -> list[Finding]:
    """Compares decoded predictions with the exact maps; empty if the teacher's output is not a map."""
    head = teacher.model.config.head
    ours, ceiling = teacher.decode_values(values), teacher.decode_values(target)
    if head == "depth":
        measure, control, exact = "depth error", "mean map", judged.depth
        ours, ceiling = ours[:, 0], ceiling[:, 0]
        anywhere = on_objects = fit.depth.log().mean(0).exp()
    elif head == "classes":
        measure, control, exact = "pixels right", "guess by position", judged.classes
        ours, ceiling = ours.argmax(1), ceiling.argmax(1)
        one_hot = F.one_hot(fit.classes)
        anywhere = one_hot.sum(0).argmax(-1)
        # On object pixels, guess the most frequent *object* class at each position: the strongest blind guess.
        on_objects = (one_hot * fit.objects[..., None]).sum(0).argmax(-1)
    else:
        return []
    found = []
    places = (("image", torch.ones_like(judged.objects), anywhere), ("objects", judged.objects, on_objects))
    for where, mask, guess in places:
        maps = (ours, guess.expand_as(exact), ceiling)
        scores = ((m - exact).abs() / exact if head == "depth" else (m == exact).float() for m in maps)
        counts = mask.flatten(1).sum(1).tolist()
        sums = ((score * mask).flatten(1).sum(1).tolist() for score in scores)
        (value, interval), (blind, _), (best, _) = (of_sums(own, counts) for own in sums)
        controls = {control: blind, TEACHER: best}
        found.append(Finding(name, f"{measure}, {where}", value, controls, head != "depth", interval))
    return found
