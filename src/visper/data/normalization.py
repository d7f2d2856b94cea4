"""The normalization of a saved image processor as one mean and one standard deviation per channel."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import transformers

from visper.common.errors import ConfigError

Color = tuple[float, ...]
DEFAULTS: Mapping[str, Any] = {
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "rescale_offset": False,
    "do_normalize": True,
    "image_mean": None,
    "image_std": None,
    "include_top": False,
    "do_flip_channel_order": False,
}
"""Settings that determine values, and what applies where neither the file nor the processor's class says."""


def normalization_of(
    settings: Mapping[str, Any], mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> tuple[Color, Color]:
    """``(mean, std)`` such that ``(rgb / 255 - mean) / std`` are the pixels of a saved image processor.

    Args:
        settings: the contents of its ``preprocessor_config.json``.
        mean, std: used if it normalizes, but neither the file nor the processor's class says by what.

    Raises:
        ConfigError: it changes values in a way that no mean and standard deviation can.
        KeyError: it normalizes by an unknown mean or standard deviation.
    """
    kind = _class_of(settings)
    used = {name: getattr(kind, name, default) for name, default in DEFAULTS.items()} | dict(settings)
    refused = {
        "do_rescale=false, so it expects values between 0 and 1 instead of images": used["do_rescale"] is False,
        "do_flip_channel_order=true, so it reads blue as red": used["do_flip_channel_order"],
    }
    for found, is_refused in refused.items():
        if is_refused:
            raise ConfigError(
                f"its image processor has {found}: expected one that rescales RGB images and may normalize them. If "
                "the model takes such images after all, correct its preprocessor_config.json"
            )
    if used["do_normalize"]:
        mean, std = used["image_mean"] or mean, used["image_std"] or std
        if mean is None or std is None:
            raise KeyError("image_mean" if mean is None else "image_std")
        if used["include_top"]:  # EfficientNet divides once more
            std = [channel * channel for channel in std]
    else:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    scale, shift = used["rescale_factor"] * 255, float(bool(used["rescale_offset"]))
    if math.isclose(scale, 1, rel_tol=1e-6) and not shift:  # some files have 1/255 in single precision
        return tuple(mean), tuple(std)
    return tuple((channel + shift) / scale for channel in mean), tuple(channel / scale for channel in std)


def _class_of(settings: Mapping[str, Any]) -> Any:
    """The processor's class, whose attributes are its defaults; None if transformers has none of this name."""
    name = str(settings.get("image_processor_type") or settings.get("feature_extractor_type"))
    return getattr(transformers, name.removesuffix("Fast").replace("FeatureExtractor", "ImageProcessor"), None)
