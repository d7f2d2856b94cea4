"""One interface to every image encoder: tokens in a row, behind one hidden layer.

Stock LLaVA reads ``encoder(pixels).hidden_states[layer]`` and optionally drops the class token. ViTs of transformers
(CLIP, SigLIP, DINOv2, DINOv3) give that; backbones that give a feature map (ConvNeXt, timm's CNNs) do not, so they
are wrapped in a small registered tower that lays the map out in rows. A folder with such a tower needs this package
to load (``import visper.model``); every other folder needs only transformers.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutput

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class FeatureMapTowerConfig(PreTrainedConfig):
    """A backbone whose output map is read as tokens, row by row."""

    model_type = "visper_feature_map_tower"

    def __init__(
        self,
        backbone_config: dict[str, Any] | PreTrainedConfig | None = None,
        hidden_size: int = 0,
        image_size: int = 224,
        patch_size: int = 32,
        **kwargs: Any,
    ) -> None:
        if isinstance(backbone_config, dict):
            backbone_config = AutoConfig.for_model(**backbone_config)
        self.backbone_config = backbone_config
        self.hidden_size = hidden_size
        self.image_size = image_size
        self.patch_size = patch_size
        super().__init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, the backbone's configuration included."""
        data = super().to_dict()
        if isinstance(self.backbone_config, PreTrainedConfig):
            data["backbone_config"] = self.backbone_config.to_dict()
        return data


class FeatureMapTower(PreTrainedModel):
    """Lays a backbone's last feature map out as ``[B, H*W, C]``, as stock LLaVA wants it."""

    config: FeatureMapTowerConfig
    config_class = FeatureMapTowerConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _supports_sdpa = True
    # A frozen tower is run whole, never split over devices: no class to keep together.
    _no_split_modules: list[str] = []  # noqa: RUF012 (the name and type are transformers')

    def __init__(self, config: FeatureMapTowerConfig, backbone: nn.Module | None = None) -> None:
        super().__init__(config)
        self.backbone = backbone if backbone is not None else AutoModel.from_config(config.backbone_config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing of its own to initialise: the backbone brings its weights."""

    def train(self, mode: bool = True) -> FeatureMapTower:
        """Trains everything but batch normalisation, whose statistics stay the backbone's own, also while it learns.

        Else a frozen tower's answer to a picture depends on the others of its batch, differs from what inference
        sees, and moves in every step by buffers that no checkpoint of learning weights holds.
        """
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutput:
        """Tokens ``[B, N, C]`` of ``pixel_values`` ``[B, 3, H, W]``, as the only hidden state."""
        features = self.backbone(pixel_values).last_hidden_state
        tokens = features.flatten(2).transpose(1, 2) if features.ndim == 4 else features
        return BaseModelOutput(last_hidden_state=tokens, hidden_states=(tokens,))


AutoConfig.register(FeatureMapTowerConfig.model_type, FeatureMapTowerConfig, exist_ok=True)
AutoModel.register(FeatureMapTowerConfig, FeatureMapTower, exist_ok=True)


@dataclass(frozen=True)
class Encoder:
    """An encoder and what the student and its processor must know of it."""

    model: PreTrainedModel
    feature_layer: int
    select: str  # LLaVA's word for it: "default" drops the first token, "full" keeps all
    image_size: int
    patch_size: int
    num_tokens: int  # as the projector receives them
    extra_tokens: int  # beside the patches, before the class token is dropped (class, registers)
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load_encoder(
    name: str, feature_layer: int = -2, image_size: int | None = None, trust_remote_code: bool = False
) -> Encoder:
    """Loads the image encoder ``name`` (hub id or folder), wrapping it where it gives maps.

    Args:
        feature_layer: hidden state the projector reads; a wrapped tower has one only, so it is ignored there.
        image_size: pixels a side; default: the encoder's own.

    Raises:
        ValueError: the layer does not exist, or the picture does not divide into patches.
    """
    config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    config = getattr(config, "vision_config", config)  # a whole CLIP or SigLIP: its image half
    model = AutoModel.from_pretrained(name, config=config, trust_remote_code=trust_remote_code)
    mean, std, own_size = _normalisation(name, model)
    size = image_size or own_size
    layers = getattr(model.config, "num_hidden_layers", None)
    with torch.no_grad():
        output = model(torch.zeros(1, 3, size, size, dtype=model.dtype), output_hidden_states=True)
    states = output.hidden_states
    if states is None or states[-1].ndim != 3 or not hasattr(model.config, "hidden_size"):
        return _wrap(model, output.last_hidden_state, size, mean, std)
    if not -len(states) <= feature_layer < len(states):
        raise ValueError(f"encoder '{name}' has {layers} layers, feature_layer is {feature_layer}: choose one of them")
    tokens = states[feature_layer].shape[1]
    patch = int(model.config.patch_size)
    if size % patch:
        raise ValueError(f"image_size {size} does not divide into the encoder's patches of {patch}: choose a multiple")
    extra = tokens - (size // patch) ** 2
    select = "default" if extra > 0 else "full"
    return Encoder(model, feature_layer, select, size, patch, tokens - (extra > 0), extra, mean, std)


def _wrap(model: PreTrainedModel, features: Tensor, size: int, mean: tuple, std: tuple) -> Encoder:
    if features.ndim == 4:
        channels, side = features.shape[1], features.shape[2]
    else:
        raise ValueError(
            f"encoder {type(model).__name__} gives {tuple(features.shape)} and no hidden states: "
            "expected a feature map [B, C, H, W]; load it through its own transformers class instead"
        )
    patch = size // side
    config = FeatureMapTowerConfig(
        backbone_config=model.config, hidden_size=channels, image_size=size, patch_size=patch, dtype=model.dtype
    )
    return Encoder(FeatureMapTower(config, model), -1, "full", size, patch, side * side, 0, mean, std)


def _normalisation(name: str, model: PreTrainedModel) -> tuple[tuple[float, ...], tuple[float, ...], int]:
    """Mean, standard deviation and size of the pictures the encoder was trained on."""
    timm_config = getattr(model.config, "pretrained_cfg", None)
    if timm_config:
        size = int(timm_config.get("input_size", (3, 224, 224))[-1])
        return tuple(timm_config.get("mean", IMAGENET_MEAN)), tuple(timm_config.get("std", IMAGENET_STD)), size
    processor: Any = None
    with contextlib.suppress(OSError):  # a bare encoder folder, without its processor: ImageNet's values stand in
        processor = AutoImageProcessor.from_pretrained(name)
    mean = tuple(getattr(processor, "image_mean", None) or IMAGENET_MEAN)
    std = tuple(getattr(processor, "image_std", None) or IMAGENET_STD)
    return mean, std, int(getattr(model.config, "image_size", 224))
