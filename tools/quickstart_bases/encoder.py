"""The quickstart's vision encoder: a CLIP vision transformer trained to recognize what each patch shows.

LLaVA reads the hidden state at layer -2, so temporary heads read the same state to predict the labels of each patch:
color and shape of its object, whether an object is centered in it, its depth and its position. The last layer is not
used, so it does nothing (its outputs are zero).

Shape suffixes: B = images, P = patches, D = width.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from tools.quickstart_bases.patches import NO_COLOR, NO_SHAPE
from tools.quickstart_bases.progress import Progress
from tools.quickstart_bases.scene_arrays import SceneArrays
from visper.quickstart.scenes import GRID, PATCH, SIZE

MEAN, STD = 0.5, 0.25
WIDTH, LAYERS = 128, 6


def new_encoder(width: int = WIDTH, layers: int = LAYERS) -> CLIPVisionModel:
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=width,
        hidden_act="gelu",
    )
    return CLIPVisionModel(config)


def image_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(
        size={"height": SIZE, "width": SIZE}, do_center_crop=False, image_mean=[MEAN] * 3, image_std=[STD] * 3
    )


def to_pixels(images: np.ndarray) -> Tensor:
    """uint8 ``[B,96,96,3]`` -> normalized ``[B,3,96,96]``, like ``image_processor``."""
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - MEAN) / STD


def patch_states(model: CLIPVisionModel, pixels: Tensor) -> Tensor:
    """Hidden state at layer -2 without the class token, ``[B,P,D]``; the last layer is not computed."""
    inner = getattr(model, "vision_model", model)
    hidden = inner.pre_layrnorm(inner.embeddings(pixels))
    for layer in inner.encoder.layers[:-1]:
        out = layer(hidden, None)
        hidden = out[0] if isinstance(out, tuple) else out
    return hidden[:, 1:]


@torch.no_grad()
def initialize(model: CLIPVisionModel, images: np.ndarray) -> None:
    """Initializes patch filters with principal components, positions with sines and cosines, and an idle last layer.

    This saves a small transformer most of its first epoch.
    """
    inner, width = getattr(model, "vision_model", model), model.config.hidden_size
    cut = (
        to_pixels(images)
        .unfold(2, PATCH, PATCH)
        .unfold(3, PATCH, PATCH)
        .permute(0, 2, 3, 1, 4, 5)
        .flatten(3)
        .flatten(0, 2)
    )
    centered = cut - cut.mean(0)
    values, vectors = torch.linalg.eigh(centered.T @ centered / len(cut))
    top = vectors.flip(1)[:, :width] / (values.flip(0)[:width].clamp(min=0).sqrt() + 0.1)
    turn = torch.linalg.qr(torch.randn(width, width))[0]
    inner.embeddings.patch_embedding.weight.copy_((top @ turn).T.reshape(width, 3, PATCH, PATCH))
    places = torch.zeros(GRID * GRID + 1, width)
    angles = torch.arange(GRID)[:, None] * torch.pi / GRID * torch.arange(1, width // 4 + 1)[None] / 4
    code = torch.cat([angles.sin(), angles.cos()], 1)
    places[1:] = torch.cat([code.repeat(GRID, 1), code.repeat_interleave(GRID, 0)], 1)
    inner.embeddings.position_embedding.weight.copy_(places * 0.7)
    last = inner.encoder.layers[-1]
    for linear in (last.self_attn.out_proj, last.mlp.fc2):
        linear.weight.zero_()
        linear.bias.zero_()


class PatchHeads(nn.Module):
    """Linear heads that read one patch state; used for training and measuring, not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.sizes = [NO_COLOR + 1, NO_SHAPE + 1, 1, 1, GRID, GRID]
        self.out = nn.Linear(WIDTH, sum(self.sizes))

    def forward(self, states_BPD: Tensor) -> tuple[Tensor, ...]:
        """Logits of color, shape, center, then the log depth, then logits of column and row, each ``[B,P,*]``."""
        return self.out(self.norm(states_BPD)).split(self.sizes, -1)


def patch_loss(heads: PatchHeads, states_BPD: Tensor, labels: dict[str, Tensor]) -> Tensor:
    """``labels``: color, shape [B,P] long, center [B,P] float, depth [B,P] float."""
    color, shape, center, depth, column, row = heads(states_BPD)
    weight = 0.3 + 0.7 * (labels["color"] < NO_COLOR).float() + 4.0 * labels["center"]
    weight = weight / weight.mean()

    def weighted(loss: Tensor) -> Tensor:
        return (loss.view_as(weight) * weight).mean()

    loss = weighted(F.cross_entropy(color.flatten(0, 1), labels["color"].flatten(), reduction="none"))
    loss = loss + weighted(F.cross_entropy(shape.flatten(0, 1), labels["shape"].flatten(), reduction="none"))
    loss = loss + 3 * F.binary_cross_entropy_with_logits(center[..., 0], labels["center"])
    loss = loss + 8 * weighted((depth[..., 0] - labels["depth"]).abs())
    place = torch.arange(GRID * GRID).expand(len(states_BPD), -1).flatten()
    loss = loss + 0.1 * F.cross_entropy(column.flatten(0, 1), place % GRID)
    return loss + 0.1 * F.cross_entropy(row.flatten(0, 1), place // GRID)


def train_encoder(
    arrays: SceneArrays, held_out: SceneArrays, out: Path, minutes: float, seed: int = 0
) -> dict[str, float]:
    """Trains for ``minutes`` of CPU time, saves model and image processor in ``out``, and returns held-out scores."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model, heads = new_encoder(), PatchHeads()
    initialize(model, arrays.images[:400])
    parameters = [*model.parameters(), *heads.parameters()]
    decayed = [p for p in parameters if p.ndim > 1]
    rest = [p for p in parameters if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98))
    bar = Progress("encoder", minutes)
    while (done := bar.share()) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 1.2e-3 * min(1.0, bar.steps / 200) * (0.5 + 0.5 * math.cos(math.pi * done))
        images, labels = arrays.batch(rng, 32)
        loss = patch_loss(heads, patch_states(model, to_pixels(images)), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        bar.step(loss.item())
        if bar.steps % 800 == 0:
            bar.say(str({k: round(v, 3) for k, v in encoder_scores(model, heads, held_out, 300).items()}))
    scores = encoder_scores(model, heads, held_out)
    model.half().save_pretrained(out)
    image_processor().save_pretrained(out)
    return scores


@torch.no_grad()
def encoder_scores(
    model: CLIPVisionModel, heads: PatchHeads, arrays: SceneArrays, limit: int | None = None
) -> dict[str, float]:
    """Color and shape accuracy and median depth error at patches where objects are centered, and F1 of the centers."""
    totals: dict[str, list[Tensor]] = {k: [] for k in ("color", "shape", "depth", "true", "found", "both")}
    for images, labels in arrays.in_order(128, limit):
        color, shape, center, depth, _, _ = heads(patch_states(model.eval(), to_pixels(images)))
        at, found = labels["center"] > 0, center[..., 0] > 0
        totals["color"].append((color.argmax(-1) == labels["color"])[at].float())
        totals["shape"].append((shape.argmax(-1) == labels["shape"])[at].float())
        totals["depth"].append((depth[..., 0] - labels["depth"])[at].abs())
        totals["true"].append(at.sum()[None].float())
        totals["found"].append(found.sum()[None].float())
        totals["both"].append((found & at).sum()[None].float())
    model.train()
    whole = {k: torch.cat(v) for k, v in totals.items()}
    return {
        "color_accuracy": whole["color"].mean().item(),
        "shape_accuracy": whole["shape"].mean().item(),
        "median_depth_error": math.expm1(whole["depth"].median().item() * math.log(15)),
        "center_f1": 2 * whole["both"].sum().item() / (whole["true"].sum() + whole["found"].sum()).item(),
    }
