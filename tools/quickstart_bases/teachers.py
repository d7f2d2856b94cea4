"""The quickstart's teachers, trained on the scenes' exact maps: depth, segmentation, and an autoencoder for gen.

Shape suffixes: B = images, H, W = pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.quickstart_bases.patches import log_depth
from tools.quickstart_bases.progress import Progress
from tools.quickstart_bases.scene_arrays import SceneArrays
from visper.quickstart.scenes import CLASSES, FAR, NEAR, SIZE
from visper.quickstart.tower import TowerConfig, TowerModel

CONFIGS: dict[str, TowerConfig] = {
    "depth": TowerConfig(head="depth", image_size=SIZE, grid=8, width=64, outputs=1, near=NEAR, far=FAR),
    "seg": TowerConfig(head="classes", image_size=SIZE, grid=8, width=64, outputs=len(CLASSES)),
    "gen": TowerConfig(head="image", image_size=SIZE, grid=1, width=128, outputs=3),
}


def to_tower(images: np.ndarray) -> Tensor:
    """uint8 ``[B,96,96,3]`` -> ``[B,3,96,96]`` in -1..1, like the tower teacher's ``preprocess``."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def _on_object(classes_BHW: Tensor) -> Tensor:
    return ((classes_BHW >= 2) & (classes_BHW <= 4)).float()


def _depth_loss(values: Tensor, images: Tensor, depth_BHW: Tensor, classes_BHW: Tensor) -> Tensor:
    error = (values[:, 0] - torch.from_numpy(log_depth(depth_BHW.numpy()))).abs()
    weight = 1 + 4 * _on_object(classes_BHW)
    return (error * weight).sum() / weight.sum()


def _class_loss(values: Tensor, images: Tensor, depth_BHW: Tensor, classes_BHW: Tensor) -> Tensor:
    weight = torch.tensor([1.0, 1.0, 3.0, 3.0, 3.0, 2.0])
    return F.cross_entropy(values, classes_BHW, weight=weight)


def _image_loss(values: Tensor, images: Tensor, depth_BHW: Tensor, classes_BHW: Tensor) -> Tensor:
    painted, wanted = values.sigmoid(), (images + 1) / 2
    weight = 1 + 3 * _on_object(classes_BHW)[:, None]
    # Averages over 4 x 4 pixels: the ground's texture does not fit into one token and would only pull colors to gray.
    coarse = (F.avg_pool2d(painted, 4) - F.avg_pool2d(wanted, 4)).abs().mean()
    return ((painted - wanted).abs() * weight).mean() + coarse


_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "depth": _depth_loss,
    "seg": _class_loss,
    "gen": _image_loss,
}


def train_teacher(
    task: str, arrays: SceneArrays, held_out: SceneArrays, out: Path, minutes: float, seed: int = 0
) -> dict[str, float]:
    """Trains the teacher of ``task`` for ``minutes`` of CPU time, saves it in ``out``, and returns held-out scores."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 9])
    model = TowerModel(CONFIGS[task]).train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.01)
    bar = Progress(f"teacher {task}", minutes)
    while (done := bar.share()) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, bar.steps / 100) * (0.5 + 0.5 * math.cos(math.pi * done))
        images, depth, classes = arrays.maps(rng, 32)
        pixels = to_tower(images).contiguous(memory_format=torch.channels_last)
        loss = _LOSSES[task](model(pixels), pixels, depth, classes)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bar.step(loss.item())
    scores = teacher_scores(task, model.eval(), held_out)
    model.half().save_pretrained(out)
    return scores


@torch.no_grad()
def teacher_scores(task: str, model: TowerModel, arrays: SceneArrays) -> dict[str, float]:
    """Scores over the image and on objects.

    Depth: mean relative error; seg: pixel accuracy; gen: mean absolute error of colors in 0..1.
    """
    kept: dict[str, list[Tensor]] = {"everywhere": [], "on_objects": []}
    for start in range(0, len(arrays), 100):
        rows = slice(start, start + 100)
        images = to_tower(arrays.images[rows])
        depth = torch.from_numpy(arrays.depths[rows].astype(np.float32))
        classes = torch.from_numpy(arrays.classes[rows].astype(np.int64))
        values = model(images)
        if task == "depth":
            score = (NEAR * (FAR / NEAR) ** values[:, 0].clamp(0, 1) / depth - 1).abs()
        elif task == "seg":
            score = (values.argmax(1) == classes).float()
        else:
            score = (values.sigmoid() - (images + 1) / 2).abs().mean(1)
        kept["everywhere"].append(score.flatten())
        kept["on_objects"].append(score[_on_object(classes) > 0])
    return {name: torch.cat(parts).mean().item() for name, parts in kept.items()}
