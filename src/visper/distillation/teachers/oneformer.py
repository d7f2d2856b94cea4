"""OneFormer as teacher (arXiv 2211.06220): the last map of its backbone."""

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import OneFormerModel

from visper.distillation.teachers.base import TargetSpec, Teacher
from visper.distillation.teachers.pretrained import divided, loaded_whole, squashed_as_trained
from visper.model.hub import sizes_of


class OneFormerTeacher(Teacher):
    """Target: the backbone's last stage (768 px, Swin-L: 24 x 24 tokens x 1536).

    Pictures are the embedding's principal components for now; drawing segments needs the pixel and transformer
    decoders, which are not kept.

    Args:
        model: hub id or folder of a ``OneFormerForUniversalSegmentation``.
        size: pixels a side, a multiple of the last stage's stride.
        revision: commit, tag or branch of a hub id; default: its main branch.
    """

    def __init__(self, model: str | Path, size: int = 768, revision: str | None = None) -> None:
        super().__init__()
        # Without the segmentation model around it, whose loss would ask for scipy.
        whole = loaded_whole(OneFormerModel, model, revision=revision)
        self.backbone = whole.pixel_level_module.encoder
        self.spec = _spec(whole.config, size)
        self.preprocess = squashed_as_trained(model, (size, size), revision=revision)
        self.freeze()

    @classmethod
    def planned_spec(cls, model: str | Path, size: int = 768, **options: Any) -> TargetSpec:
        """Read from the configuration alone."""
        return _spec(sizes_of(str(model), "oneformer teacher"), size)

    def encode(self, pixels: Tensor) -> Tensor:
        """``[B, rows * columns, channels]``, row by row."""
        last: Tensor = self.backbone(pixels).feature_maps[-1]
        return last.flatten(2).transpose(1, 2)


def _spec(config: Any, size: int) -> TargetSpec:
    side = divided(size, max(config.strides), "oneformer")
    return TargetSpec(side * side, int(config.backbone_config.hidden_size), (side, side))
