"""Depth Anything (V1, V2) as teacher: DINOv2 backbone, DPT head (arXiv 2406.09414).

Shape suffixes: B = samples, N = patches, E = backbone width.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForDepthEstimation

from visper.distillation.teachers.base import TargetSpec, Teacher
from visper.distillation.teachers.pretrained import divided, load_complete, squashed_as_trained
from visper.model.hub import sizes_of


class DepthAnythingTeacher(Teacher):
    """Target: the mean of the backbone levels that the depth head reads, or the last one (336 px, Large: 576 x 1024).

    Args:
        model: hub id or folder of a ``DepthAnythingForDepthEstimation`` (the published ``-hf`` weights).
        size: side of the image in pixels, a multiple of the patch size.
        levels: "mean", as in the paper's pre-training, or "last", as in its probes.
        revision: commit, tag or branch of a hub id; default: its main branch.
    """

    def __init__(
        self,
        model: str | Path,
        size: int = 336,
        levels: Literal["mean", "last"] = "mean",
        revision: str | None = None,
    ) -> None:
        super().__init__()
        if levels not in ("mean", "last"):
            raise ValueError(f"'levels' is {levels!r}: set it to mean or last")
        _refuse_pth(model)
        self.model = load_complete(AutoModelForDepthEstimation, model, trust_remote_code=False, revision=revision)
        self.levels, self.read = len(self.model.config.neck_hidden_sizes), levels
        self.spec = _spec(self.model.config, size)
        self.preprocess = squashed_as_trained(model, (size, size), revision=revision)
        self.freeze()

    @classmethod
    def planned_spec(cls, model: str | Path, size: int = 336, **options: Any) -> TargetSpec:
        """Read from the configuration alone."""
        _refuse_pth(model)
        return _spec(sizes_of(str(model), "depth_anything teacher", revision=options.get("revision")), size)

    def encode(self, pixels: Tensor) -> Tensor:
        """``[B, N, E]``, without the class token."""
        levels = self.model.backbone(pixels).feature_maps
        if self.read == "last":
            last: Tensor = levels[-1][:, -self.spec.tokens :]
            return last
        mean: Tensor = torch.stack([level[:, -self.spec.tokens :] for level in levels]).mean(0)
        return mean

    @torch.no_grad()
    def decode(self, embedding: Tensor, pixels: Tensor | None = None, reference: Tensor | None = None) -> Tensor:
        """Depth as brightness (near = bright), from the head with ``embedding`` at each of its inputs.

        Each image is scaled to 0..1, as relative depth has no unit.
        """
        weight = next(self.model.head.parameters())
        tokens = embedding.to(weight.device, weight.dtype)
        # The head drops the first token of each level, the class token.
        level = torch.cat((torch.zeros_like(tokens[:, :1]), tokens), dim=1)
        assert self.spec.grid is not None
        depth = self.model.head(self.model.neck([level] * self.levels, *self.spec.grid), *self.spec.grid).float()
        low, high = depth.amin((1, 2), keepdim=True), depth.amax((1, 2), keepdim=True)
        return ((depth - low) / (high - low).clamp(min=1e-6))[:, None].expand(-1, 3, -1, -1).contiguous()


def _refuse_pth(model: str | Path) -> None:
    if Path(model).suffix == ".pth":
        raise ValueError(
            f"'{model}' is a .pth file of the original Depth Anything code, expected weights in transformers' format: "
            "set 'model' to depth-anything/Depth-Anything-V2-Large-hf (or Base, Small), or a folder of one"
        )


def _spec(config: Any, size: int) -> TargetSpec:
    side = divided(size, int(config.patch_size), "depth_anything")
    return TargetSpec(side * side, int(config.reassemble_hidden_size), (side, side))
