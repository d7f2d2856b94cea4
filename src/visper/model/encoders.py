"""A common interface to image encoders: a sequence of tokens from one hidden layer.

Stock LLaVA reads ``encoder(pixels).hidden_states[layer]`` and optionally drops the class token. ViTs of transformers
(CLIP, SigLIP, DINOv2, DINOv3) provide this. Backbones that output a feature map (ConvNeXt) and all timm models do not,
so they are wrapped in a small registered tower that flattens the map. A folder with such a tower needs this package to
load (``import visper.model``) and says so in its README.md; every other folder needs only transformers.
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

from visper.common.errors import ConfigError, first_line
from visper.data.normalization import Color, normalization_of
from visper.model.hub import UNREADABLE, loading, sizes_of, stored_file

logger = logging.getLogger(__name__)

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class FeatureMapTowerConfig(PreTrainedConfig):
    """Configuration of a ``FeatureMapTower``.

    Args:
        backbone_config: configuration of a backbone that transformers can load, including timm's.
        hidden_size: width of the tokens.
        image_size, patch_size: side length in pixels of the image, and of the area that one token covers.
        channels_last: the feature map is ``[B, H, W, C]`` (timm's Swin) instead of ``[B, C, H, W]``.
        prefix_tokens: number of class and register tokens to drop, if the backbone outputs tokens (timm's ViTs).
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
        """The configuration as plain data, including the backbone's."""
        data = super().to_dict()
        if isinstance(self.backbone_config, PreTrainedConfig):
            data["backbone_config"] = self.backbone_config.to_dict()
        return data


class FeatureMapTower(PreTrainedModel):
    """Flattens a backbone's last feature map to tokens ``[B, H*W, C]``, as stock LLaVA expects."""

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
        """Does nothing: the tower has no weights besides the backbone's."""

    def train(self, mode: bool = True) -> FeatureMapTower:
        """Keeps batch normalization in evaluation mode even while training, with the backbone's own statistics.

        Otherwise the features of an image would depend on the rest of its batch, would differ from those at inference,
        and would drift with buffers that checkpoints of trainable weights do not hold.
        """
        super().train(mode)
        for module in self.modules():
            if isinstance(module, BATCH_NORMS):
                module.eval()
        return self

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutput:
        """Tokens ``[B, N, C]`` for ``pixel_values`` ``[B, 3, H, W]``, returned as the only hidden state."""
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
    """An encoder and what the student and its processor need to know about it."""

    model: PreTrainedModel
    feature_layer: int
    select: str  # LLaVA's vision_feature_select_strategy: "default" drops the first token, "full" keeps all
    image_size: int
    patch_size: int
    num_tokens: int  # tokens that the projector receives
    extra_tokens: int  # tokens other than patches (class, registers), before the class token is dropped
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
    """Loads the image encoder ``name`` (hub id or folder, including timm's); wraps it if it outputs feature maps.

    Args:
        feature_layer: hidden state that the projector reads; ignored for a wrapped tower, which has only one.
        image_size: side length in pixels; default: the encoder's own.
        weights: False loads only the configuration: parameters are on the meta device, and the preprocessor
            configuration is not read.
        revision: commit, tag or branch of a hub id; default: its main branch.
        device_map: "meta" reads no weights, but everything else.

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
            f"encoder '{name}' does not accept images of {size} px ({error}): set 'student.image_size' to another "
            f"size, or remove it to use the encoder's own {own_size}"
        ) from error
    if not states:
        return _wrap(model, last, size, mean, std)
    # transformers' LLaVA takes 0, the patch embeddings, for "no hidden states".
    if feature_layer == 0 or not -len(states) <= feature_layer < len(states):
        layers = len(states) - 1
        raise ConfigError(
            f"encoder '{name}' has {layers} layers, but feature_layer is {feature_layer}: choose 1 to {layers}, or "
            f"-1 to {-layers} from the end"
        )
    tokens = states[feature_layer][1]
    patch = int(model.config.patch_size)
    if size % patch:
        raise ConfigError(f"image_size {size} is not a multiple of the encoder's patch size {patch}: choose a multiple")
    extra = tokens - (size // patch) ** 2
    select = "default" if extra > 0 else "full"
    return Encoder(model, feature_layer, select, size, patch, tokens - (extra > 0), extra, mean, std)


def _image_half(config: PreTrainedConfig) -> PreTrainedConfig:
    half: PreTrainedConfig = getattr(config, "vision_config", config)  # CLIP and SigLIP also have a text model
    return half


def _is_timm(model: PreTrainedModel) -> bool:
    return hasattr(model, "timm_model")


def _shapes(model: PreTrainedModel, size: int) -> tuple[list[torch.Size], torch.Size]:
    """Shapes of the hidden states that stock LLaVA can read (empty if there are none), and of the last output."""
    if model.device.type == "meta":
        return _probed(model, size)
    try:
        # On the meta device, because a real forward pass is slow with large images (ConvNeXt-XXL, 768 px).
        with torch.device("meta"):
            return _probed(type(model)(model.config), size)
    except RuntimeError:  # the forward pass needs values, which meta tensors lack
        return _probed(model, size)


@torch.no_grad()
def _probed(model: PreTrainedModel, size: int) -> tuple[list[torch.Size], torch.Size]:
    pixels = torch.zeros(1, 3, size, size, dtype=model.dtype, device=model.device)
    if _is_timm(model):  # hidden states of timm models, if any, are feature maps
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
            f"encoder {type(model).__name__} outputs {tuple(shape)} and no hidden states: expected a feature map "
            "[B, C, H, W]; load it through its own transformers class instead"
        )
    side = math.isqrt(cells)
    patch = size // max(side, 1)
    if not side or side * side != cells or size // patch != side:
        raise ConfigError(
            f"encoder {type(model).__name__} makes {cells} tokens from an image of {size} px, which do not form a "
            "square grid of equal cells: set 'student.image_size' to a multiple of its stride"
        )
    if hasattr(model.config, "do_pooling"):
        model.config.do_pooling = False  # skips timm's pooled output, which is not used
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
    """Mean, standard deviation and image size from the configuration; ImageNet's mean and std if it has none."""
    timm_config: dict[str, Any] = getattr(config, "pretrained_cfg", None) or {}
    if not timm_config and getattr(config, "model_type", "") == "timm_wrapper":
        import timm

        found = timm.get_pretrained_cfg(config.architecture)
        timm_config = found.to_dict() if found is not None else {}
    own = getattr(config, "image_size", 224)
    size = timm_config.get("input_size", (3, own, own))[-1]
    return tuple(timm_config.get("mean", IMAGENET_MEAN)), tuple(timm_config.get("std", IMAGENET_STD)), int(size)


def _normalization(name: str, model: PreTrainedModel, **options: Any) -> tuple[Color, Color, int]:
    """Mean, standard deviation and size of the images on which the encoder was trained.

    Raises:
        ConfigError: its preprocessor configuration cannot be read, asks for more than normalization, or it is unknown
            whether it has one.
    """
    mean, std, size = _colors(model.config)
    if _is_timm(model):
        return mean, std, size
    try:
        processor = AutoImageProcessor.from_pretrained(name, **options)
    except (OSError, *UNREADABLE) as error:
        for file in ("preprocessor_config.json", "processor_config.json"):
            if stored_file(name, file, options.get("revision")) is not None:
                raise ConfigError(f"encoder '{name}': cannot read its {file}: {first_line(error)}") from error
        logger.warning("encoder '%s' has no preprocessor_config.json: normalizing with ImageNet's mean and std", name)
        return mean, std, size
    try:
        return *normalization_of(processor.to_dict(), mean, std), size
    except ConfigError as error:
        raise ConfigError(f"encoder '{name}': {error}") from error
