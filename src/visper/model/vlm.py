"""Image-text-to-text models of transformers as students, with their own processors and limits of an image's size."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, LlavaConfig

from visper.common.errors import ConfigError
from visper.config import VlmStudent
from visper.data.chat_template import behind_images
from visper.model.hub import loading
from visper.model.known import require_known
from visper.model.parts import PROJECTOR, parameters_of
from visper.model.student import ANSWERING_SIDE, Student
from visper.model.task_tokens import task_token_names
from visper.model.words import set_to_mean


def build_vlm(config: VlmStudent, dtype: Any = torch.float32, skeleton: bool = False) -> Student:
    """The model that ``config`` names with its own processor.

    Args:
        dtype: "auto": as stored, but for the projector, which is float32.
        skeleton: on the meta device, without its weights.

    Raises:
        ConfigError: it cannot be loaded, or it is not a model that can be trained here; the latter is found out before
            its weights are loaded.
    """
    options: dict[str, Any] = {"revision": config.vlm_revision, "trust_remote_code": config.trust_remote_code}
    with loading("student.vlm", config.vlm):
        found = AutoConfig.from_pretrained(config.vlm, **options)
    if isinstance(found, LlavaConfig):
        raise ConfigError(
            f"student.vlm: '{config.vlm}' is a LLaVA, which a run continues: remove 'student' and set start_from to it"
        )
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
        model.config.image_grid_pinpoints = pinpoints  # the model counts an image's tiles by its own copy
    if dtype == "auto":
        for _, parameter in parameters_of(model, PROJECTOR):
            parameter.data = parameter.data.float()
    student = Student(model.eval(), processor, task_token_ids(config, processor.tokenizer))
    _make_room(student)
    return student


def task_token_ids(config: VlmStudent, tokenizer: Any) -> dict[str, list[int]]:
    """Per task the ids of its tokens, which the tokenizer gains if it lacks them."""
    layout = config.task_tokens
    names = {task: task_token_names(task, layout.per_task) for task in layout.order} if layout else {}
    tokenizer.add_tokens([name for of_task in names.values() for name in of_task], special_tokens=True)
    return {task: list(tokenizer.convert_tokens_to_ids(of_task)) for task, of_task in names.items()}


def _make_room(student: Student) -> None:
    """Gives the model rows for its task tokens, set to the mean of its own, and keeps it from answering with them."""
    new, model = student.silent_ids, student.model
    if not new:
        return
    size = len(model.get_input_embeddings().weight)
    if max(new) >= size:
        model.resize_token_embeddings(max(new) + 1, mean_resizing=False)
    set_to_mean((model.get_input_embeddings(), model.get_output_embeddings()), new, min(size, *new))
    kept = model.generation_config.suppress_tokens or []
    model.generation_config.suppress_tokens = sorted({*kept, *new})


def build_vlm_processor(config: VlmStudent) -> Any:
    """The model's own processor, its images limited to ``max_pixels``.

    Raises:
        ConfigError: it cannot be loaded, or has no such limit.
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
    ids = task_token_ids(config, processor.tokenizer)
    if ids:
        names = processor.tokenizer.convert_ids_to_tokens([token for of_task in ids.values() for token in of_task])
        processor.chat_template = behind_images(processor.chat_template, "".join(names))
    return processor


def limit_pixels(processor: Any, max_pixels: int) -> None:
    """Makes the processor scale images down to ``max_pixels``, in its own way; the limit is saved with it.

    Raises:
        ConfigError: it sees every image at one size, or the limit is below the smallest that it can make.
    """
    images = processor.image_processor
    for attribute, limit in _LIMITS.items():
        if getattr(images, attribute, None) is not None:
            limit(images, max_pixels)
            return
    raise ConfigError(
        f"student.max_pixels={max_pixels}: {type(images).__name__} makes every image the same size ({images.size}): "
        "remove max_pixels"
    )


def _limit_area(images: Any, max_pixels: int) -> None:
    """Qwen: any size within two areas, which transformers calls edges."""
    smallest = (images.patch_size * images.merge_size) ** 2
    _require(max_pixels, smallest)
    shortest = min(images.size["shortest_edge"], max_pixels)
    images.size = type(images.size)(shortest_edge=shortest, longest_edge=max_pixels)


def _limit_tiles(images: Any, max_pixels: int) -> None:
    """InternVL: as many tiles of one size as fit (the small view of the image comes on top)."""
    tile = images.size["height"] * images.size["width"]
    _require(max_pixels, tile)
    images.max_patches = max_pixels // tile
    images.min_patches = min(images.min_patches, images.max_patches)


def _limit_pinpoints(images: Any, max_pixels: int) -> None:
    """LLaVA-OneVision: one of a list of sizes (the small view of the image comes on top)."""
    areas = [height * width for height, width in images.image_grid_pinpoints]
    _require(max_pixels, min(areas))
    kept = [size for size, area in zip(images.image_grid_pinpoints, areas, strict=True) if area <= max_pixels]
    images.image_grid_pinpoints = kept


def _limit_side(images: Any, max_pixels: int) -> None:
    """SmolVLM: a longer side, cut into tiles (the small view of the image comes on top)."""
    tile = images.max_image_size["longest_edge"]
    _require(max_pixels, tile * tile)
    images.size = type(images.size)(longest_edge=math.isqrt(max_pixels) // tile * tile)


def _require(max_pixels: int, smallest: int) -> None:
    if max_pixels < smallest:
        raise ConfigError(f"student.max_pixels={max_pixels}: this model's images have at least {smallest} pixels")


_LIMITS: dict[str, Callable[[Any, int], None]] = {
    "merge_size": _limit_area,
    "max_patches": _limit_tiles,
    "image_grid_pinpoints": _limit_pinpoints,
    "max_image_size": _limit_side,
}
"""Attribute that tells how an image processor sizes images -> what limits it."""
