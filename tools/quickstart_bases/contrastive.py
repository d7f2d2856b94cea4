"""The study's vision encoder, trained like CLIP by contrasting images with captions, and by nothing else.

A caption lists the objects' names from left to right. The same names from right to left are an additional negative,
and the caption of the mirrored image. So the encoder learns names and left-right order, but depth, size and position
only as far as these need them.

Shape suffixes: B = images, O = objects, P = patches, D = width.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionModel

from tools.quickstart_bases.encoder import image_processor, initialize, new_encoder, to_pixels
from tools.quickstart_bases.progress import Progress
from tools.quickstart_bases.scene_arrays import SceneArrays
from visper.quickstart.scenes import COLORS, SHAPES

WIDTH, LAYERS, MOST = 96, 4, 6
NAMES = {f"{color} {shape}": i + 1 for i, (color, shape) in enumerate((c, s) for c in COLORS for s in SHAPES)}
"""Name -> its id in a caption; 0 is no object."""


def captions(arrays: SceneArrays) -> Tensor:
    """Ids of the objects' names from left to right, ``[B, O]`` long."""
    rows = np.zeros((len(arrays), MOST), np.int64)
    for row, objects in zip(rows, arrays.objects, strict=True):
        names = [NAMES[o.name] for o in sorted(objects, key=lambda o: o.column)][:MOST]
        row[: len(names)] = names
    return torch.from_numpy(rows)


def reversed_captions(captions_BO: Tensor) -> Tensor:
    """The same names from right to left."""
    count = (captions_BO > 0).sum(1, keepdim=True)
    source = count - 1 - torch.arange(MOST)
    return torch.where(source >= 0, captions_BO.gather(1, source.clamp(min=0)), 0)


class CaptionReader(nn.Module):
    """Encodes captions as vectors ``[B, D]``; used only in training."""

    def __init__(self) -> None:
        super().__init__()
        self.names = nn.Embedding(len(NAMES) + 1, WIDTH)
        self.order = nn.Parameter(torch.randn(MOST, WIDTH) * 0.3)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, 0.0, batch_first=True, norm_first=True)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, captions_BO: Tensor) -> Tensor:
        there = (captions_BO > 0)[..., None]
        states = self.layer(self.names(captions_BO) + self.order, src_key_padding_mask=captions_BO == 0)
        pooled: Tensor = self.out((states * there).sum(1) / there.sum(1))
        return pooled


class ImageReader(nn.Module):
    """Encodes images as vectors ``[B, D]``: a small head on the encoder's last states, averaged over patches."""

    def __init__(self, encoder: CLIPVisionModel) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )

    def forward(self, pixels: Tensor) -> Tensor:
        states_BPD = self.encoder(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
        pooled: Tensor = self.head(states_BPD).mean(1)
        return pooled


def begin_encoder(images: np.ndarray) -> CLIPVisionModel:
    """An encoder initialized like the quickstart's, but with a last layer that is used."""
    model = new_encoder(WIDTH, LAYERS)
    last = getattr(model, "vision_model", model).encoder.layers[-1]
    begun = {name: value.clone() for name, value in last.state_dict().items()}
    initialize(model, images)
    last.load_state_dict(begun)
    return model


def train_contrastive(
    arrays: SceneArrays, held_out: SceneArrays, out: Path, minutes: float, seed: int = 0
) -> dict[str, float]:
    """Trains for ``minutes`` of CPU time, saves model and image processor in ``out``, and returns held-out scores."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    image, text, told = ImageReader(begin_encoder(arrays.images[:400])), CaptionReader(), captions(arrays)
    scale = nn.Parameter(torch.tensor(2.5))
    parameters = [*image.parameters(), *text.parameters(), scale]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.98), weight_decay=0.02)
    bar = Progress("encoder_contrastive", minutes)
    while (done := bar.share()) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-3 * min(1.0, bar.steps / 100) * (0.5 + 0.5 * math.cos(math.pi * done))
        rows, mirrored = arrays.indices(rng, 64)
        images = arrays.images[rows]
        images[mirrored] = images[mirrored][:, :, ::-1]
        own = told[rows]
        own = torch.where(torch.from_numpy(mirrored)[:, None], reversed_captions(own), own)
        logits = scale.exp() * _cosines(image(to_pixels(images)), text(torch.cat([own, reversed_captions(own)])))
        right = torch.arange(len(rows))
        loss = F.cross_entropy(logits, right) + F.cross_entropy(logits[:, : len(rows)].T, right)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        bar.step(loss.item())
    scores = contrastive_scores(image, text, held_out)
    image.encoder.half().save_pretrained(out)
    image_processor().save_pretrained(out)
    return scores


@torch.no_grad()
def contrastive_scores(image: ImageReader, text: CaptionReader, arrays: SceneArrays) -> dict[str, float]:
    """Accuracy of choosing an image's caption among 64 captions and their 64 reversed versions."""
    told, found = captions(arrays), []
    for start in range(0, len(arrays) - 63, 64):
        own = told[start : start + 64]
        cosines = _cosines(
            image(to_pixels(arrays.images[start : start + 64])), text(torch.cat([own, reversed_captions(own)]))
        )
        found.append((cosines.argmax(1) == torch.arange(64)).float().mean())
    return {"caption_of_128": torch.stack(found).mean().item()}


def _cosines(images_BD: Tensor, texts_BD: Tensor) -> Tensor:
    return F.normalize(images_BD, dim=-1) @ F.normalize(texts_BD, dim=-1).T
