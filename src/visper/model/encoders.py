"""One interface to every image encoder: tokens in a row, behind one hidden layer.

Stock LLaVA reads ``encoder(pixels).hidden_states[layer]`` and optionally drops the class token. ViTs of transformers
(CLIP, SigLIP, DINOv2, DINOv3) give that; backbones that give a feature map (ConvNeXt) and all of timm's do not, so they
are wrapped in a small registered tower that lays the map out in rows. A folder with such a tower needs this package
to load (``import visper.model``) and says so in its README.md; every other folder needs only transformers.
"""

from __future__ import annotations

import logging
import math
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

from visper.common.errors import ConfigError
from visper.model.hub import loading, sizes_of

logger = logging.getLogger(__name__)

Color = tuple[float, ...]
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class FeatureMapTowerConfig(PreTrainedConfig):
    """A backbone whose output map is read as tokens, row by row.

    Args:
        backbone_config: of a backbone that transformers knows, timm's included.
        hidden_size: width of the tokens.
        image_size, patch_size: pixels a side of the image and of one token's cell.
        channels_last: the map comes as ``[B, H, W, C]`` (timm's Swin), not ``[B, C, H, W]``.
        prefix_tokens: class and register tokens of a backbone that gives tokens (timm's ViTs); left out.
    """

    model_type = "visper_feature_map_tower"

    def __init__(
        self,
        backbone_config: dict[str, Any] | PreTrainedConfig | None = None,
        hidden_size: int = 0,
        image_size: int = 224,
        patch_size: int = 32,
        channels_last: bool = False,
        prefix_tokens: int = 0,
        **kwargs: Any,
    ) -> None:
        if isinstance(backbone_config, dict):
            backbone_config = AutoConfig.for_model(**backbone_config)
        self.backbone_config = backbone_config
        self.hidden_size = hidden_size
        self.image_size = image_size
        self.patch_size = patch_size
        self.channels_last = channels_last
        self.prefix_tokens = prefix_tokens
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

    def __init__(self, config: FeatureMapTowerConfig, backbone: nn.Module | None = None) -> None:
        super().__init__(config)
        self.backbone = backbone if backbone is not None else AutoModel.from_config(config.backbone_config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing of its own to initialize: the backbone brings its weights."""

    def train(self, mode: bool = True) -> FeatureMapTower:
        """Keeps batch normalization in evaluation mode, with the backbone's own statistics, even while training.

        Otherwise the features of an image would depend on the rest of its batch, differ from those at inference, and
        drift with buffers that no checkpoint of trainable weights holds.
        """
        super().train(mode)
        for module in self.modules():
            if isinstance(module, BATCH_NORMS):
                module.eval()
        return self

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutput:
        """Tokens ``[B, N, C]`` of ``pixel_values`` ``[B, 3, H, W]``, as the only hidden state."""
        features = self.backbone(pixel_values).last_hidden_state
        if features.ndim == 3:
            tokens = features[:, self.config.prefix_tokens :]
        else:
            tokens = features.flatten(1, 2) if self.config.channels_last else features.flatten(2).transpose(1, 2)
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
    mean: Color
    std: Color


def load_encoder(
    name: str,
    feature_layer: int = -2,
    image_size: int | None = None,
    trust_remote_code: bool = False,
    weights: bool = True,
    revision: str | None = None,
    device_map: str | None = None,
) -> Encoder:
    """Loads the image encoder ``name`` (hub id or folder, timm's included), wrapping it where it gives maps.

    Args:
        feature_layer: hidden state the projector reads; a wrapped tower has one only, so it is ignored there.
        image_size: pixels a side; default: the encoder's own.
        weights: False = the sizes alone: parameters on the meta device, colors not looked up.
        revision: commit, tag or branch of a hub id; default: its main branch.
        device_map: "meta": the encoder as it is loaded, but without its weights.

    Raises:
        ConfigError: the encoder cannot be loaded, the layer does not exist, or the image does not divide into patches.
    """
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
    if weights:
        with loading("student.encoder", name):
            config = _image_half(AutoConfig.from_pretrained(name, **options))
            model = AutoModel.from_pretrained(name, config=config, device_map=device_map, **options)
    else:
        config = _image_half(sizes_of(name, "student.encoder", **options))
        with loading("student.encoder", name), torch.device("meta"):
            model = AutoModel.from_config(config, trust_remote_code=trust_remote_code)
    mean, std, own_size = _normalization(name, model, **options) if weights else _colors(model.config)
    size = image_size or own_size
    try:
        states, last = _shapes(model, size)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"encoder '{name}' takes no images of {size} px ({error}): set 'student.image_size' to another size, or "
            f"leave it out for its own {own_size}"
        ) from error
    if not states:
        return _wrap(model, last, size, mean, std)
    if not -len(states) <= feature_layer < len(states):
        layers = len(states) - 1
        raise ConfigError(f"encoder '{name}' has {layers} layers, feature_layer is {feature_layer}: choose one of them")
    tokens = states[feature_layer][1]
    patch = int(model.config.patch_size)
    if size % patch:
        raise ConfigError(f"image_size {size} does not divide into the encoder's patches of {patch}: choose a multiple")
    extra = tokens - (size // patch) ** 2
    select = "default" if extra > 0 else "full"
    return Encoder(model, feature_layer, select, size, patch, tokens - (extra > 0), extra, mean, std)


def _image_half(config: PreTrainedConfig) -> PreTrainedConfig:
    half: PreTrainedConfig = getattr(config, "vision_config", config)  # of a CLIP or SigLIP with its text model
    return half


def _is_timm(model: PreTrainedModel) -> bool:
    return hasattr(model, "timm_model")


def _shapes(model: PreTrainedModel, size: int) -> tuple[list[torch.Size], torch.Size]:
    """Shapes of the hidden states that stock LLaVA could read (none: it cannot) and of the last output."""
    if model.device.type == "meta":
        return _probed(model, size)
    try:
        # On the meta device: a forward of the real thing is slow where images are large (ConvNeXt-XXL, 768 px).
        with torch.device("meta"):
            return _probed(type(model)(model.config), size)
    except RuntimeError:  # it computes with values, of which there are none
        return _probed(model, size)


@torch.no_grad()
def _probed(model: PreTrainedModel, size: int) -> tuple[list[torch.Size], torch.Size]:
    pixels = torch.zeros(1, 3, size, size, dtype=model.dtype, device=model.device)
    if _is_timm(model):  # its hidden states are maps, where it has any
        return [], model.eval()(pixels, do_pooling=False).last_hidden_state.shape
    output = model.eval()(pixels, output_hidden_states=True)
    states = output.hidden_states
    if states is None or states[-1].ndim != 3 or not hasattr(model.config, "hidden_size"):
        return [], output.last_hidden_state.shape
    return [state.shape for state in states], states[-1].shape


def _wrap(model: PreTrainedModel, shape: torch.Size, size: int, mean: Color, std: Color) -> Encoder:
    timm_model = getattr(model, "timm_model", None)
    channels_last = str(getattr(timm_model, "output_fmt", None)) == "NHWC"
    prefix = 0
    if len(shape) == 4:
        width, cells = (shape[3], shape[1] * shape[2]) if channels_last else (shape[1], shape[2] * shape[3])
    elif len(shape) == 3 and timm_model is not None:
        prefix = int(getattr(timm_model, "num_prefix_tokens", 0))
        width, cells = shape[2], shape[1] - prefix
    else:
        raise ConfigError(
            f"encoder {type(model).__name__} gives {tuple(shape)} and no hidden states: "
            "expected a feature map [B, C, H, W]; load it through its own transformers class instead"
        )
    side = math.isqrt(cells)
    patch = size // max(side, 1)
    if not side or side * side != cells or size // patch != side:
        raise ConfigError(
            f"encoder {type(model).__name__} makes {cells} tokens of an image of {size} px, no square of equal cells: "
            "set 'student.image_size' to a multiple of its stride"
        )
    if hasattr(model.config, "do_pooling"):
        model.config.do_pooling = False  # timm's pooled output: computed for nobody
    config = FeatureMapTowerConfig(
        backbone_config=model.config,
        hidden_size=width,
        image_size=size,
        patch_size=patch,
        channels_last=channels_last,
        prefix_tokens=prefix,
        dtype=model.dtype,
    )
    return Encoder(FeatureMapTower(config, model), -1, "full", size, patch, cells, 0, mean, std)


def _colors(config: PreTrainedConfig) -> tuple[Color, Color, int]:
    """Mean, standard deviation and size that a configuration itself tells; ImageNet's colors where it is silent."""
    timm_config: dict[str, Any] = getattr(config, "pretrained_cfg", None) or {}
    if not timm_config and getattr(config, "model_type", "") == "timm_wrapper":
        import timm

        found = timm.get_pretrained_cfg(config.architecture)
        timm_config = found.to_dict() if found is not None else {}
    own = getattr(config, "image_size", 224)
    size = timm_config.get("input_size", (3, own, own))[-1]
    return tuple(timm_config.get("mean", IMAGENET_MEAN)), tuple(timm_config.get("std", IMAGENET_STD)), int(size)


def _normalization(name: str, model: PreTrainedModel, **options: Any) -> tuple[Color, Color, int]:
    """Mean, standard deviation and size of the images the encoder was trained on."""
    mean, std, size = _colors(model.config)
    if _is_timm(model):
        return mean, std, size
    processor: Any = None
    try:
        processor = AutoImageProcessor.from_pretrained(name, **options)
    except OSError:
        logger.warning("encoder '%s' has no preprocessor_config.json: its images get ImageNet's mean and std", name)
    return (
        tuple(getattr(processor, "image_mean", None) or mean),
        tuple(getattr(processor, "image_std", None) or std),
        size,
    )
