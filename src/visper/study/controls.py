"""What an arm is compared with: targets of other images, and the teachers' features as input."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, CLIPVisionConfig, CLIPVisionModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from visper.quickstart.tower import TowerConfig, TowerModel, TowerTeacher

SCALE = 4.0
"""Deviation of what projectors read, about that of the quickstart's encoder, whose learning rates the recipes have."""


class ShuffledTeacher(TowerTeacher):
    """Gives every image the target of the image before it in its micro-batch: as many targets of the same kind, which
    say nothing about the image."""

    def encode(self, pixels: Tensor) -> Tensor:
        if len(pixels) < 2:
            raise ValueError("one image alone has no other image's target: set optimization.micro_batch to 2 or more")
        return super().encode(pixels).roll(1, dims=0)


class StudyTowerConfig(PreTrainedConfig):
    """An encoder and the teachers, if any, whose tokens lie beside its states."""

    model_type = "visper_study_tower"

    def __init__(
        self,
        encoder: dict[str, Any] | None = None,
        teachers: list[dict[str, Any]] | None = None,
        image_size: int = 96,
        patch_size: int = 12,
        **other: Any,
    ) -> None:
        super().__init__(**other)
        self.encoder, self.teachers = encoder or {}, teachers or []
        self.image_size, self.patch_size = image_size, patch_size

    @property
    def hidden_size(self) -> int:
        """Width of a patch: the encoder's state, its column and row, the teachers' tokens."""
        side = self.image_size // self.patch_size
        return int(self.encoder.get("hidden_size", 0)) + 2 * side + sum(int(t["width"]) for t in self.teachers)


class StudyTower(PreTrainedModel):
    """What an arm's projector reads of each patch: the encoder's state, standardized, its column and row, and, in the
    arm that is fed features, the frozen teachers' tokens.

    A student with it needs this package to load.
    """

    config: StudyTowerConfig
    config_class = StudyTowerConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    mean: Tensor
    deviation: Tensor

    def __init__(self, config: StudyTowerConfig) -> None:
        super().__init__(config)
        self.encoder = CLIPVisionModel(CLIPVisionConfig(**config.encoder))
        self.teachers = nn.ModuleList(TowerModel(TowerConfig(**sizes)) for sizes in config.teachers)
        width = self.encoder.config.hidden_size
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing of its own to initialize: its parts bring their weights."""

    def train(self, mode: bool = True) -> StudyTower:
        """The teachers stay in evaluation mode: their normalization has statistics of its own."""
        super().train(mode)
        self.teachers.eval()
        return self

    def states(self, pixel_values: Tensor) -> Tensor:
        """The encoder's last states ``[B, P, D]``, without the class token."""
        return self.encoder(pixel_values, output_hidden_states=True).hidden_states[-1][:, 1:]

    def forward(self, pixel_values: Tensor, **options: Any) -> BaseModelOutput:
        """``pixel_values [B, 3, S, S]``, normalized as the encoder takes them -> tokens ``[B, P, hidden_size]``."""
        states = SCALE * (self.states(pixel_values) - self.mean) / self.deviation
        side = self.config.image_size // self.config.patch_size
        one = SCALE * side**0.5 * torch.eye(side, dtype=states.dtype, device=states.device)
        places = torch.cat([one.repeat(side, 1), one.repeat_interleave(side, 0)], dim=1)
        parts = [states, places.expand(len(states), -1, -1)]
        with torch.no_grad():
            pixels = pixel_values / 2  # the encoder's images have a deviation of 0.25, the teachers' of 0.5
            parts += [SCALE * cast(TowerModel, teacher).encode(pixels) for teacher in self.teachers]
        tokens = torch.cat(parts, dim=-1)
        return BaseModelOutput(last_hidden_state=tokens, hidden_states=(tokens,))


AutoConfig.register(StudyTowerConfig.model_type, StudyTowerConfig, exist_ok=True)
AutoModel.register(StudyTowerConfig, StudyTower, exist_ok=True)


@torch.no_grad()
def save_tower(encoder: Path, teachers: list[Path], images: Tensor, folder: Path) -> None:
    """Makes the folder of a tower; ``images [S, 3, H, W]``, normalized, give the statistics of its states."""
    own = CLIPVisionModel.from_pretrained(encoder, dtype=torch.float32)
    told = [TowerModel.from_pretrained(teacher, dtype=torch.float32) for teacher in teachers]
    tower = StudyTower(StudyTowerConfig(own.config.to_dict(), [one.config.to_dict() for one in told]))
    tower.encoder.load_state_dict(own.state_dict())
    for mine, teacher in zip(tower.teachers, told, strict=True):
        mine.load_state_dict(teacher.state_dict())
    states = tower.eval().states(images).flatten(0, 1)
    tower.mean.copy_(states.mean(0))
    tower.deviation.copy_(states.std(0).clamp(min=1e-3))
    tower.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_bytes((encoder / "preprocessor_config.json").read_bytes())
