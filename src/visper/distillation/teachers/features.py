"""Any image encoder of transformers (DINOv2, DINOv3, SigLIP 2, CLIP, ...) as teacher: its patch tokens at one layer."""

from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel

from visper.distillation.teachers.base import TargetSpec, Teacher
from visper.distillation.teachers.pretrained import divided, load_complete, squashed_as_trained
from visper.model.hub import loading, sizes_of


class FeaturesTeacher(Teacher):
    """Target: the patch tokens of an encoder, without class token and registers, on the image's grid.

    Args:
        model: hub id or folder of an image encoder, or of a model that has one (CLIP, SigLIP).
        size: side of the image in pixels, a multiple of the patch size; default: the encoder's own. For 576 tokens it
            is 336 with patches of 14 (DINOv2) and 384 with patches of 16 (DINOv3, SigLIP 2).
        layer: index into transformers' ``hidden_states`` (0 = embeddings, -1 = last); default: the encoder's output,
            which most encoders normalize once more.
        trust_remote_code: run code from the model's repository; read it first.
        revision: commit, tag or branch of a hub id; default: its main branch.

    Raises:
        ValueError: the encoder takes no square images, has no such layer, or its patches do not divide ``size``.
    """

    def __init__(
        self,
        model: str | Path,
        size: int | None = None,
        layer: int | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
    ) -> None:
        super().__init__()
        with loading("teacher", str(model)):
            config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code, revision=revision)
        config = getattr(config, "vision_config", config)
        self.encoder = load_complete(
            AutoModel, model, config=config, trust_remote_code=trust_remote_code, revision=revision
        )
        takes = signature(self.encoder.forward).parameters
        if "spatial_shapes" in takes:
            raise ValueError(
                f"'{model}' takes ragged patches (NaFlex), not square images: choose a checkpoint of fixed resolution, "
                "such as google/siglip2-large-patch16-384"
            )
        own = _side(getattr(config, "image_size", 224))
        size = size or own
        self.layer = layer
        # SigLIP and CLIP adapt their position embeddings to another size only on request; the DINO models always do.
        self.extras: dict[str, Any] = {}
        if size != own and "interpolate_pos_encoding" in takes:
            self.extras["interpolate_pos_encoding"] = True
        self.preprocess = squashed_as_trained(model, (size, size), revision=revision)
        self.freeze()
        # A trial run shows which tokens are patches, and whether the layer exists.
        blank = torch.zeros(1, 3, size, size, dtype=self.encoder.dtype)
        with torch.no_grad():
            try:
                states = self._states(blank)
            except RuntimeError as error:
                raise ValueError(
                    f"{type(self.encoder).__name__} does not accept images of {size} px ({error}): remove "
                    f"'size' to use its own {own}"
                ) from error
            rows, columns = self._grid(states, size)
            if states.ndim == 3:
                self._require_patches_last(blank, rows * columns)
        self.spec = TargetSpec(rows * columns, states.shape[1 if states.ndim == 4 else 2], (rows, columns))

    @classmethod
    def planned_spec(cls, model: str | Path, size: int | None = None, **options: Any) -> TargetSpec:
        """Read from the configuration alone if the encoder is a plain ViT; otherwise by loading it."""
        trusted = bool(options.get("trust_remote_code", False))
        config = sizes_of(str(model), "features teacher", trust_remote_code=trusted, revision=options.get("revision"))
        config = getattr(config, "vision_config", config)
        # Encoders whose stages merge patches list a depth or width for each stage.
        in_stages = hasattr(config, "depths") or hasattr(config, "hidden_sizes")
        has_neck = hasattr(config, "output_channels")  # SAM's output is narrower than its layers
        if in_stages or has_neck or not hasattr(config, "patch_size") or not hasattr(config, "hidden_size"):
            return cls(model, size=size, **options).spec
        side = divided(size or _side(config.image_size), _side(config.patch_size), "features")
        return TargetSpec(side * side, int(config.hidden_size), (side, side))

    def encode(self, pixels: Tensor) -> Tensor:
        """``[B, rows * columns, width]``, row by row."""
        states = self._states(pixels)
        # The class token and registers come before the patches.
        return states.flatten(2).transpose(1, 2) if states.ndim == 4 else states[:, -self.spec.tokens :]

    def _states(self, pixels: Tensor) -> Tensor:
        if self.layer is None:
            return _channels_first(self.encoder(pixels, **self.extras).last_hidden_state)
        states = self.encoder(pixels, output_hidden_states=True, **self.extras).hidden_states
        if not -len(states) <= self.layer < len(states):
            raise ValueError(
                f"'layer' is {self.layer}, but {type(self.encoder).__name__} has hidden states 0 (embeddings) to "
                f"{len(states) - 1}: choose one of them"
            )
        return _channels_first(states[self.layer])

    def _grid(self, states: Tensor, size: int) -> tuple[int, int]:
        if states.ndim == 4:
            return states.shape[2], states.shape[3]
        if not hasattr(self.encoder.config, "patch_size"):
            raise ValueError(
                f"{type(self.encoder).__name__} gives a row of {states.shape[1]} tokens and no patch size: set 'layer' "
                "to one whose output is a map, such as -1, or choose another encoder"
            )
        side = divided(size, _side(self.encoder.config.patch_size), "features")
        if states.shape[1] < side * side:
            raise ValueError(
                f"{type(self.encoder).__name__} gives {states.shape[1]} tokens for an image of {size} pixels, fewer "
                f"than its {side} x {side} patches: it merges or drops some, and has no grid; choose another encoder"
            )
        return side, side

    def _require_patches_last(self, blank: Tensor, tokens: int) -> None:
        """Refuses encoders that put other tokens behind the patches (YOLOS) or shuffle the patches (ViT-MAE).

        Before the first layer, a token depends on its own patch alone, so that other tokens are the same in all images.
        """
        ramp = torch.linspace(-1, 1, blank.shape[-1], dtype=blank.dtype).expand_as(blank)
        images = torch.cat((blank, ramp, ramp))
        states = self.encoder(images, output_hidden_states=True, **self.extras).hidden_states
        if not states or states[0].ndim != 3:
            return
        first, second, again = states[0][:, -tokens:]
        if bool((first == second).all(-1).any()) or not torch.allclose(second, again):
            raise ValueError(
                f"the last {tokens} tokens of {type(self.encoder).__name__} are not its patches in order: it puts "
                "other tokens behind them, or shuffles them; choose another encoder"
            )


def _channels_first(states: Tensor) -> Tensor:
    """Maps ``[B, H, W, C]`` (inner layers of SAM) as ``[B, C, H, W]``; images are square, so their maps are too."""
    last = states.ndim == 4 and states.shape[1] == states.shape[2] != states.shape[3]
    return states.permute(0, 3, 1, 2) if last else states


def _side(value: Any) -> int:
    return int(value if isinstance(value, int) else value[0])
