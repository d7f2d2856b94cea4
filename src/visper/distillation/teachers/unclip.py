"""The image encoder of unCLIP pipelines as teacher: CLIP's projected image embedding."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPVisionModelWithProjection

from visper.distillation.teachers.base import TargetSpec, Teacher
from visper.distillation.teachers.pretrained import load_complete, squashed_as_trained
from visper.model.hub import sizes_of


class UnClipTeacher(Teacher):
    """Target: one token, the projected image embedding (224 px, CLIP-H: 1 x 1024).

    Only the encoder is loaded. With ``draw: diffusion``, the rest of the pipeline (UNet, scheduler, decoder) is loaded
    from ``model`` when the first image is drawn.

    Args:
        model: hub id or folder of a ``CLIPVisionModelWithProjection``, or of a pipeline that holds one.
        subfolder: subfolder of the encoder ("image_encoder" in a pipeline).
        processor_subfolder: subfolder of the image processor; default: "feature_extractor", as in pipelines, if
            ``subfolder`` is given, else the top folder.
        draw: "diffusion" draws an image with the pipeline (extra `diffusion`); "neighbors" draws none: the images with
            the nearest embeddings are shown instead.
        steps: number of diffusion steps.
        revision: commit, tag or branch of a hub id; default: its main branch.
    """

    def __init__(
        self,
        model: str | Path,
        subfolder: str = "",
        processor_subfolder: str | None = None,
        draw: Literal["neighbors", "diffusion"] = "neighbors",
        steps: int = 20,
        revision: str | None = None,
    ) -> None:
        super().__init__()
        if draw not in ("neighbors", "diffusion"):
            raise ValueError(f"'draw' is {draw!r}: set it to neighbors or diffusion")
        if draw == "diffusion" and find_spec("diffusers") is None:
            raise ModuleNotFoundError("No module named 'diffusers'", name="diffusers")
        self.encoder = load_complete(CLIPVisionModelWithProjection, model, subfolder=subfolder, revision=revision)
        if processor_subfolder is None:
            processor_subfolder = "feature_extractor" if subfolder else ""
        size = int(self.encoder.config.image_size)
        self.spec = TargetSpec(1, int(self.encoder.config.projection_dim))
        self.preprocess = squashed_as_trained(model, (size, size), subfolder=processor_subfolder, revision=revision)
        self.place, self.draw, self.steps, self.revision = str(model), draw, steps, revision
        self._pipeline: Any = None
        self.freeze()

    @property
    def draws_images(self) -> bool:
        """Whether the diffusion pipeline draws images."""
        return self.draw == "diffusion"

    @classmethod
    def planned_spec(cls, model: str | Path, subfolder: str = "", **options: Any) -> TargetSpec:
        """Read from the configuration alone."""
        return TargetSpec(
            1, int(sizes_of(str(model), "unclip teacher", subfolder, revision=options.get("revision")).projection_dim)
        )

    def encode(self, pixels: Tensor) -> Tensor:
        """``[B, 1, width]``."""
        embedding: Tensor = self.encoder(pixels).image_embeds
        return embedding[:, None]

    @torch.no_grad()
    def decode(self, embedding: Tensor, pixels: Tensor | None = None, reference: Tensor | None = None) -> Tensor:
        """Images that the pipeline generates from the embeddings, from the same noise each time."""
        if self.draw != "diffusion":
            return super().decode(embedding, reference=reference)
        weight = next(self.encoder.parameters())
        pipeline = self._diffusion().to(weight.device, weight.dtype)
        drawn = []
        for one in embedding.to(weight.device, weight.dtype):
            noise = torch.Generator().manual_seed(0)
            found = pipeline(
                prompt="", image_embeds=one, num_inference_steps=self.steps, generator=noise, output_type="pt"
            )
            drawn.append(found.images.float())
        return torch.cat(drawn).clamp(0, 1)

    def _diffusion(self) -> Any:
        if self._pipeline is None:
            from diffusers import StableUnCLIPImg2ImgPipeline

            self._pipeline = StableUnCLIPImg2ImgPipeline.from_pretrained(
                self.place, image_encoder=self.encoder, feature_extractor=None, revision=self.revision
            )
            self._pipeline.set_progress_bar_config(disable=True)
        return self._pipeline


def nearest(embedding: Tensor, gallery: Tensor, count: int = 1) -> Tensor:
    """The rows of ``gallery`` ``[G, N, E]`` nearest to each of ``embedding`` ``[B, N, E]`` by cosine, best first.

    Returns:
        ``[B, min(count, G)]`` long.
    """
    cosines = normalize(embedding.flatten(1).float(), dim=1) @ normalize(gallery.flatten(1).float(), dim=1).T
    return cosines.topk(min(count, len(gallery)), dim=1).indices
