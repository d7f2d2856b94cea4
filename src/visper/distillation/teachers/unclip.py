"""The image encoder of unCLIP pipelines as teacher: CLIP's projected image embedding."""

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from visper.distillation.teachers.base import TargetSpec, Teacher
from visper.distillation.teachers.pretrained import loaded_whole, squashed_as_trained
from visper.model.hub import sizes_of


class UnClipTeacher(Teacher):
    """Target: one token, the projected image embedding (224 px, CLIP-H: 1 x 1024).

    Pictures show the embedding's channels for now; drawing an image needs the diffusion pipeline, which is not kept.

    Args:
        model: hub id or folder of a ``CLIPVisionModelWithProjection``, or of a pipeline that holds one.
        subfolder: where in it the encoder lies ("image_encoder" in a pipeline).
        processor_subfolder: where its image processor lies; default: "feature_extractor", where pipelines keep it, if
            ``subfolder`` is given, else beside the encoder.
        revision: commit, tag or branch of a hub id; default: its main branch.
    """

    def __init__(
        self,
        model: str | Path,
        subfolder: str = "",
        processor_subfolder: str | None = None,
        revision: str | None = None,
    ) -> None:
        super().__init__()
        self.encoder = loaded_whole(CLIPVisionModelWithProjection, model, subfolder=subfolder, revision=revision)
        if processor_subfolder is None:
            processor_subfolder = "feature_extractor" if subfolder else ""
        size = int(self.encoder.config.image_size)
        self.spec = TargetSpec(1, int(self.encoder.config.projection_dim))
        self.preprocess = squashed_as_trained(model, (size, size), subfolder=processor_subfolder, revision=revision)
        self.freeze()

    @classmethod
    def planned_spec(cls, model: str | Path, subfolder: str = "", **options: Any) -> TargetSpec:
        """Read from the configuration alone."""
        return TargetSpec(1, int(sizes_of(str(model), "unclip teacher", subfolder).projection_dim))

    def encode(self, pixels: Tensor) -> Tensor:
        """``[B, 1, width]``."""
        embedding: Tensor = self.encoder(pixels).image_embeds
        return embedding[:, None]
