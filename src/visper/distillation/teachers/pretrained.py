"""Helpers of teachers from transformers: load complete weights, read color normalization, check sizes."""

from pathlib import Path
from typing import Any

from transformers.image_processing_base import ImageProcessingMixin

from visper.common.errors import ConfigError, counted
from visper.data.normalization import normalization_of
from visper.distillation.teachers.base import SquashedImage
from visper.model.hub import loading


def squashed_as_trained(model: str | Path, size: tuple[int, int], **options: Any) -> SquashedImage:
    """Preprocessing to ``size`` (height, width), normalized as by the model's saved image processor.

    Args:
        **options: for ``from_pretrained``, such as ``subfolder``.

    Raises:
        ValueError: the model comes without an image processor, or with one that does more than normalize.
    """
    place = f"{model}/{options['subfolder']}" if options.get("subfolder") else str(model)
    try:
        # Only read: building OneFormer's processor would download its class names from another repository of the hub.
        processor, _ = ImageProcessingMixin.get_image_processor_dict(model, **options)
        mean, std = normalization_of(processor)
    except ConfigError as error:
        raise ValueError(f"teacher '{place}': {error}") from error
    except (OSError, KeyError) as error:
        raise ValueError(
            f"no image processor at '{place}': a teacher needs its preprocessor_config.json, which says how its "
            "colors are normalized; save it beside the weights"
        ) from error
    red, green, blue = mean
    std_red, std_green, std_blue = std
    return SquashedImage(size, (red, green, blue), (std_red, std_green, std_blue))


def load_complete(kind: Any, model: str | Path, **options: Any) -> Any:
    """``kind.from_pretrained(model)``. Raises ValueError if weights are missing: no part of a teacher may be random."""
    with loading("teacher", str(model)):
        found, info = kind.from_pretrained(model, output_loading_info=True, **options)
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise ValueError(
            f"'{model}' lacks {counted(len(missing), 'weight')} of {kind.__name__}, such as '{missing[0]}': give a "
            "model of the teacher's 'kind'"
        )
    return found


def divided(size: int, stride: int, kind: str) -> int:
    """Cells per side of an image of ``size`` pixels; raises ValueError if ``stride`` does not divide it."""
    if size % stride:
        raise ValueError(
            f"teacher '{kind}' divides its image into cells of {stride} pixels, which do not divide {size}: "
            f"set 'size' to {size // stride * stride or stride} or {(size // stride + 1) * stride}"
        )
    return size // stride
