"""Complete image-text-to-text models of transformers as students, with their own processors and image size limits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, LlavaConfig

from visper.common.errors import ConfigError
from visper.config import VlmStudent
from visper.data.chat_template import answering_template, behind_images, default_template
from visper.model.hub import loading
from visper.model.known import require_known
from visper.model.parts import PROJECTOR, parameters_of
from visper.model.student import ANSWERING_SIDE, Student, suppress
from visper.model.task_tokens import task_token_names
from visper.model.words import set_to_mean


def build_vlm(config: VlmStudent, dtype: Any = torch.float32, skeleton: bool = False) -> Student:
    """The model that ``config`` names, with its own processor.

    Args:
        dtype: precision of the model; "auto" keeps the stored one, except for the projector, which is float32.
        skeleton: read no weights; parameters are on the meta device.

    Raises:
        ConfigError: the model cannot be loaded, or (checked before loading weights) cannot be trained.
    """
    options: dict[str, Any] = {"revision": config.vlm_revision, "trust_remote_code": config.trust_remote_code}
    with loading("student.vlm", config.vlm):
        found = AutoConfig.from_pretrained(config.vlm, **options)
    if isinstance(found, LlavaConfig):
        raise ConfigError(f"student.vlm: '{config.vlm}' is a LLaVA: remove 'student', and set start_from to it instead")
    require_known(config.vlm, found, config.trust_remote_code)
    processor = build_vlm_processor(config)
    if skeleton:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(found, trust_remote_code=config.trust_remote_code)
    else:
        with loading("student.vlm", config.vlm):
            model = AutoModelForImageTextToText.from_pretrained(config.vlm, dtype=dtype, **options)
    pinpoints = getattr(processor.image_processor, "image_grid_pinpoints", None)
    if pinpoints is not None:
        model.config.image_grid_pinpoints = pinpoints  # the model uses its own copy to count an image's tiles
    if dtype == "auto":
        for _, parameter in parameters_of(model, PROJECTOR):
            parameter.data = parameter.data.float()
    student = Student(model.eval(), processor, task_token_ids(config, processor.tokenizer))
    _make_room(student)
    return student


def task_token_ids(config: VlmStudent, tokenizer: Any) -> dict[str, list[int]]:
    """The ids of each task's tokens, which are added to the tokenizer if missing."""
    layout = config.task_tokens
    names = {task: task_token_names(task, layout.per_task) for task in layout.order} if layout else {}
    tokenizer.add_tokens([name for of_task in names.values() for name in of_task], special_tokens=True)
    return {task: list(tokenizer.convert_tokens_to_ids(of_task)) for task, of_task in names.items()}


def _make_room(student: Student) -> None:
    """Adds rows for the task tokens, set to the mean of the existing ones, and suppresses the tokens in generation."""
    new, model = student.silent_ids, student.model
    if not new:
        return
    size = len(model.get_input_embeddings().weight)
    if max(new) >= size:
        model.resize_token_embeddings(max(new) + 1, mean_resizing=False)
    embeddings = [model.get_input_embeddings(), model.get_output_embeddings()]
    # Each layer of a small Gemma 4 has embeddings of its own. Those of Gemma 3n cannot be resized.
    if getattr(model.config.get_text_config(), "hidden_size_per_layer_input", None):
        if not hasattr(model, "get_per_layer_input_embeddings"):
            raise ConfigError(
                f"student.task_tokens: a {model.config.model_type} has embeddings of each layer, which cannot get rows "
                "for new tokens: remove task_tokens, and set the tasks' 'at' to image_tokens"
            )
        embeddings.append(model.get_per_layer_input_embeddings())
    set_to_mean(embeddings, new, min(size, *new))
    suppress(model.generation_config, new)


def build_vlm_processor(config: VlmStudent) -> Any:
    """The model's own processor, with images limited to ``max_pixels`` and the task tokens in its chat template.

    Raises:
        ConfigError: it cannot be loaded, or cannot limit the size of images, or answers do not follow its prompts.
    """
    with loading("student.vlm", config.vlm):
        processor = AutoProcessor.from_pretrained(
            config.vlm,
            revision=config.vlm_revision,
            trust_remote_code=config.trust_remote_code,
            padding_side=ANSWERING_SIDE,
        )
    if config.max_pixels is not None:
        limit_pixels(processor, config.max_pixels)
    if processor.chat_template:
        template = default_template(processor, f"the processor of '{config.vlm}'")
        processor.chat_template = answering_template(processor, template, as_parts=True)
    ids = task_token_ids(config, processor.tokenizer)
    if ids:
        names = processor.tokenizer.convert_ids_to_tokens([token for of_task in ids.values() for token in of_task])
        processor.chat_template = behind_images(processor.chat_template, "".join(names))
    return processor


def limit_pixels(processor: Any, max_pixels: int) -> None:
    """Sets the processor's own limit on image sizes to ``max_pixels``; the limit is saved with the processor.

    Raises:
        ConfigError: it resizes every image to the same size, or the limit is below its smallest size.
    """
    images = processor.image_processor
    for attribute, limit in _LIMITS.items():
        if getattr(images, attribute, None) is not None:
            limit(images, max_pixels)
            return
    raise ConfigError(
        f"student.max_pixels={max_pixels}: {type(images).__name__} has no limit that is known here: remove max_pixels"
    )


def _limit_area(images: Any, max_pixels: int) -> None:
    """Qwen: any size between a smallest and a largest area, which transformers calls edges."""
    side = images.patch_size * images.merge_size
    _require(max_pixels, side**2)
    shortest, area = min(images.size["shortest_edge"], max_pixels), (64 * side) ** 2
    images.size = type(images.size)(shortest_edge=shortest, longest_edge=area)
    # GLM-4V counts an image as two frames, so that a limit allows half the area.
    frames = round(area / (images.get_number_of_image_patches(128 * side, 128 * side) * images.patch_size**2))
    images.size = type(images.size)(shortest_edge=shortest, longest_edge=frames * max_pixels)


def _limit_tiles(images: Any, max_pixels: int) -> None:
    """InternVL: a number of tiles of one size (plus a thumbnail of the image, which is not counted)."""
    tile = images.size["height"] * images.size["width"]
    _require(max_pixels, tile)
    images.max_patches = max_pixels // tile
    images.min_patches = min(images.min_patches, images.max_patches)


def _limit_pinpoints(images: Any, max_pixels: int) -> None:
    """LLaVA-OneVision: one of a list of sizes (plus a thumbnail of the image, which is not counted)."""
    areas = [height * width for height, width in images.image_grid_pinpoints]
    _require(max_pixels, min(areas))
    kept = [size for size, area in zip(images.image_grid_pinpoints, areas, strict=True) if area <= max_pixels]
    images.image_grid_pinpoints = kept


def _limit_side(images: Any, max_pixels: int) -> None:
    """SmolVLM: a maximum side length, cut into tiles (plus a thumbnail of the image, which is not counted)."""
    tile = images.max_image_size["longest_edge"]
    _require(max_pixels, tile * tile)
    images.size = type(images.size)(longest_edge=math.isqrt(max_pixels) // tile * tile)


def _limit_tokens(images: Any, max_pixels: int) -> None:
    """Gemma 4: one of a list of numbers of tokens, each a square of patches; images are enlarged to it, too."""
    token = (images.patch_size * images.pooling_kernel_size) ** 2
    _require(max_pixels, _GEMMA_4_TOKENS[0] * token)
    images.max_soft_tokens = max(count for count in _GEMMA_4_TOKENS if count * token <= max_pixels)


_GEMMA_4_TOKENS = (70, 140, 280, 560, 1120)
"""The numbers that its image processor accepts."""


def _require(max_pixels: int, smallest: int) -> None:
    if max_pixels < smallest:
        raise ConfigError(
            f"student.max_pixels={max_pixels} is too small: this model's images have at least {smallest} pixels"
        )


_LIMITS: dict[str, Callable[[Any, int], None]] = {
    "merge_size": _limit_area,
    "max_patches": _limit_tiles,
    "image_grid_pinpoints": _limit_pinpoints,
    "max_image_size": _limit_side,
    "max_soft_tokens": _limit_tokens,
}
"""Attribute that only one kind of image processor has -> the function that limits its image sizes."""
