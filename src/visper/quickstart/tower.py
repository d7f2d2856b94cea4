"""Small convolutional teachers, saved as ``transformers`` models, that encode an image into tokens and decode tokens.

Three heads share one design: ``depth`` (a map of log depths), ``classes`` (logits of a segmentation) and ``image``
(an autoencoder that encodes the image as one token). The tokens are standardized per channel, so that the same loss
weights fit all of them.

Shape suffixes: B = images, N = tokens, E = token width, H, W = pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from visper.common.console import without_loading_bars
from visper.distillation.teachers.base import SquashedImage, TargetSpec, Teacher

HEADS = ("depth", "classes", "image")
CLASS_COLORS = (
    (0.55, 0.50, 0.45),
    (0.70, 0.80, 0.92),
    (0.86, 0.22, 0.22),
    (0.20, 0.45, 0.86),
    (0.95, 0.75, 0.15),
    (0.45, 0.25, 0.55),
)


class TowerConfig(PretrainedConfig):
    """Configuration of a tower.

    Args:
        head: one of ``HEADS``.
        image_size: side of the image in pixels.
        grid: side of the grid of tokens; 1: a single token.
        width: width of a token.
        inner: width of the first stage of the trunk, half that of the second.
        outputs: decoded channels: 1 for depth, the number of classes, or 3 for colors.
        near, far: range of a decoded depth in meters.
    """

    model_type = "visper_tower"

    def __init__(
        self,
        head: str = "depth",
        image_size: int = 96,
        grid: int = 8,
        width: int = 64,
        inner: int = 64,
        outputs: int = 1,
        near: float = 2.0,
        far: float = 30.0,
        **other: Any,
    ) -> None:
        super().__init__(**other)
        self.head, self.image_size, self.grid, self.width = head, image_size, grid, width
        self.inner, self.outputs, self.near, self.far = inner, outputs, near, far


def _trunk(inner: int) -> nn.Sequential:
    """Image ``[B,3,S,S]`` -> features ``[B,2*inner,S/12,S/12]``, with a receptive field of about 100 pixels."""
    wide = 2 * inner
    return nn.Sequential(
        nn.Conv2d(3, inner // 2, 5, stride=3, padding=1),
        nn.GELU(),
        nn.Conv2d(inner // 2, inner, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Conv2d(inner, wide, 3, stride=2, padding=1),
        _Residual(wide),
        _Residual(wide),
        nn.GELU(),
    )


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, width)
        self.wide = nn.Conv2d(width, width, 5, padding=2, groups=width // 16)
        self.mix = nn.Conv2d(width, width, 1)

    def forward(self, features: Tensor) -> Tensor:
        return features + self.mix(F.gelu(self.wide(F.gelu(self.norm(features)))))


class TowerModel(PreTrainedModel):
    """``encode``: ``[B,3,S,S]`` in -1..1 -> ``[B,N,E]``; ``decode``: ``[B,N,E]`` -> ``[B,outputs,S,S]`` raw values."""

    config_class = TowerConfig
    main_input_name = "pixel_values"

    def __init__(self, config: TowerConfig) -> None:
        super().__init__(config)
        if config.head not in HEADS:
            raise ValueError(f"unknown head '{config.head}' of a tower teacher: expected one of {', '.join(HEADS)}")
        if config.image_size % 12 or config.grid not in (1, config.image_size // 12):
            raise ValueError(
                f"image_size {config.image_size} with grid {config.grid}: expected a multiple of 12 pixels and a grid "
                f"of {config.image_size // 12}, or 1 for one token"
            )
        cells, inner = config.image_size // 12, config.inner
        self.trunk = _trunk(inner)
        if config.grid == 1:
            self.to_token: nn.Module = nn.Sequential(
                nn.Conv2d(2 * inner, 32, 1), nn.Flatten(), nn.Linear(32 * cells**2, config.width)
            )
            self.from_token: nn.Module = nn.Sequential(
                nn.Linear(config.width, 64 * cells**2),
                nn.GELU(),
                nn.Unflatten(1, (64, cells, cells)),
                nn.Conv2d(64, 2 * inner, 3, padding=1),
            )
        else:
            self.to_token = nn.Sequential(nn.Conv2d(2 * inner, config.width, 1), nn.Flatten(2))
            self.from_token = nn.Sequential(
                nn.Unflatten(2, (cells, cells)), nn.Conv2d(config.width, 2 * inner, 3, padding=1)
            )
        self.standard = nn.BatchNorm1d(config.width, affine=False)
        self.painter = nn.Sequential(
            nn.GELU(),
            nn.ConvTranspose2d(2 * inner, inner // 2, 3, stride=3),
            nn.Conv2d(inner // 2, inner // 2, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(inner // 2, 16 * config.outputs, 3, padding=1),
            nn.PixelShuffle(4),
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Keeps PyTorch's own initialization: that of transformers is meant for linear layers."""

    def encode(self, pixel_values: Tensor) -> Tensor:
        tokens = self.standard(self.to_token(self.trunk(pixel_values)))
        return tokens[:, None] if self.config.grid == 1 else tokens.transpose(1, 2)

    def decode(self, embedding: Tensor) -> Tensor:
        tokens = embedding[:, 0] if self.config.grid == 1 else embedding.transpose(1, 2)
        return self.painter(self.from_token(tokens))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """The decoded values of the encoded image, which training compares with the exact map."""
        return self.decode(self.encode(pixel_values))


class TowerTeacher(Teacher):
    """A saved ``TowerModel`` as a teacher; ``model`` is its folder."""

    @without_loading_bars()
    def __init__(self, model: str | Path) -> None:
        super().__init__()
        self.model = TowerModel.from_pretrained(model, dtype=torch.float32)
        config = self.model.config
        tokens = config.grid**2
        self.spec = TargetSpec(tokens, config.width, (config.grid, config.grid) if config.grid > 1 else None)
        self.preprocess = SquashedImage((config.image_size, config.image_size), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        self.freeze()

    def encode(self, pixels: Tensor) -> Tensor:
        return self.model.encode(pixels)

    def decode_values(self, embedding: Tensor) -> Tensor:
        """Depth in meters ``[B,1,H,W]``, class logits ``[B,C,H,W]`` or colors in 0..1 ``[B,3,H,W]``, depending on
        the head."""
        config = self.model.config
        weight = next(self.model.parameters())
        values = self.model.decode(embedding.to(weight.device, weight.dtype)).float()
        if config.head == "depth":
            return config.near * (config.far / config.near) ** values.clamp(0, 1)
        return values.sigmoid() if config.head == "image" else values

    @property
    def draws_images(self) -> bool:
        """True: every head has a decoder that draws an image, even from one token."""
        return True

    def decode(self, embedding: Tensor, pixels: Tensor | None = None, reference: Tensor | None = None) -> Tensor:
        """Draws nearness, classes or colors; ``pixels`` and ``reference`` are not used."""
        values = self.decode_values(embedding)
        if self.model.config.head == "depth":
            return nearness_images(values, self.model.config.near, self.model.config.far)
        return class_images(values.argmax(1)) if self.model.config.head == "classes" else values


def nearness_images(depths: Tensor, near: float, far: float) -> Tensor:
    """Depths in meters ``[B,1,H,W]`` -> gray images ``[B,3,H,W]`` on a logarithmic scale, where near is white."""
    span = torch.log(torch.tensor(far / near))
    gray = 1 - torch.log(depths.clamp(near, far) / near) / span
    return gray.clamp(0, 1).expand(-1, 3, -1, -1)


def class_images(classes: Tensor) -> Tensor:
    """Class indices ``[B,H,W]`` -> color images ``[B,3,H,W]`` (the palette repeats beyond its colors)."""
    palette = torch.tensor(CLASS_COLORS, device=classes.device)
    return palette[classes % len(palette)].permute(0, 3, 1, 2).contiguous()
