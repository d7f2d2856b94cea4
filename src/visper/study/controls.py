"""The two control conditions: targets of other images, and the teachers' features as input."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, CLIPVisionConfig, CLIPVisionModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from visper.common.console import without_loading_bars
from visper.common.lock import new_folder
from visper.model import load_student, save_student
from visper.quickstart.tower import TowerConfig, TowerModel, TowerTeacher

SCALE = 4.0
"""Standard deviation of the projector's input: about that of the quickstart's encoder, for which the learning rates
were found."""


class ShuffledTeacher(TowerTeacher):
    """Gives every image the target of the previous image in its micro-batch: targets of the same distribution that say
    nothing about the image."""

    def encode(self, pixels: Tensor) -> Tensor:
        if len(pixels) < 2:
            raise ValueError("one image alone has no other image's target: set optimization.micro_batch to 2 or more")
        return super().encode(pixels).roll(1, dims=0)


class StudyTowerConfig(PreTrainedConfig):
    """Configuration of an encoder and of the teachers, if any, whose tokens are concatenated to its states."""

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
        """Width of a patch: encoder state, one-hot column and row, teachers' tokens."""
        side = self.image_size // self.patch_size
        return int(self.encoder.get("hidden_size", 0)) + 2 * side + sum(int(t["width"]) for t in self.teachers)


class StudyTower(PreTrainedModel):
    """The projector's input for each patch: the encoder's standardized state, the patch's column and row and, with
    feature feeding, the frozen teachers' tokens.

    A student with this tower needs this package to load.
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
        """Does nothing: all weights come from the parts."""

    def train(self, mode: bool = True) -> StudyTower:
        """Keeps the teachers in evaluation mode, so that their normalization statistics do not change."""
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


@without_loading_bars()
@torch.no_grad()
def save_tower(encoder: Path, images: Tensor, folder: Path) -> None:
    """Saves a tower without teachers. Normalized ``images [S, 3, H, W]`` give the statistics for standardizing."""
    own = CLIPVisionModel.from_pretrained(encoder, dtype=torch.float32)
    tower = StudyTower(StudyTowerConfig(own.config.to_dict()))
    tower.encoder.load_state_dict(own.state_dict())
    states = tower.eval().states(images).flatten(0, 1)
    tower.mean.copy_(states.mean(0))
    tower.deviation.copy_(states.std(0).clamp(min=1e-3))
    tower.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_bytes((encoder / "preprocessor_config.json").read_bytes())


@without_loading_bars()
@torch.no_grad()
def save_fed(start: str | Path, teachers: list[Path], folder: Path) -> None:
    """Saves the student of ``start`` with the teachers' tokens as additional input.

    The projector's columns for them are zero, so it answers as before.
    """
    student = load_student(start)
    model, before = student.model, student.model.model.vision_tower
    assert isinstance(before, StudyTower)
    told = [TowerModel.from_pretrained(teacher, dtype=torch.float32) for teacher in teachers]
    sizes = [one.config.to_dict() for one in told]
    tower = StudyTower(StudyTowerConfig(before.config.encoder, sizes))
    tower.load_state_dict(before.state_dict(), strict=False)
    for mine, teacher in zip(tower.teachers, told, strict=True):
        mine.load_state_dict(teacher.state_dict())
    projector = model.model.multi_modal_projector
    narrow = projector.linear_1
    projector.linear_1 = nn.Linear(tower.config.hidden_size, narrow.out_features)
    projector.linear_1.weight.zero_()
    projector.linear_1.weight[:, : narrow.in_features] = narrow.weight
    projector.linear_1.bias.copy_(narrow.bias)
    model.model.vision_tower, model.config.vision_config = tower, tower.config
    with new_folder(folder) as partial:
        save_student(student, partial)
