"""The cost of a run's teachers: bytes of their weights and activations, and FLOPs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from visper.common.compat import around_operations
from visper.config import Run, Target
from visper.distillation import Teacher, build_teacher
from visper.distillation.teachers.tasks import DTYPES
from visper.model.hub import sizes_of
from visper.planning.fake_step import FakeTensorMode, LiveBytes, fake_parameters
from visper.training.flops import Products

PUBLISHED: Mapping[str, tuple[str, str, int]] = {
    "depth_anything": ("AutoModelForDepthEstimation", "backbone", 336),
    "oneformer": ("OneFormerModel", "pixel_level_module.encoder", 768),
    "unclip": ("CLIPVisionModelWithProjection", "", 224),
    "features": ("AutoModel", "", 0),
    "dinov2": ("AutoModel", "", 0),
}
"""Kind -> transformers class of its configuration, the submodule that runs, default image side in pixels (0: the
encoder's own). These kinds are measured without their weights; other kinds are loaded and run."""
FEATURES = ("features", "dinov2")
"""Kinds that accept image sizes other than the one they were trained with."""


@dataclass(frozen=True)
class TeacherSize:
    """Bytes of a teacher's weights, peak bytes of its activations for a micro-batch of images, FLOPs of one image."""

    weights: float
    activations: float
    flops: float


def measure_teachers(run: Run, on_gpu: bool) -> tuple[dict[str, TeacherSize], list[Teacher]]:
    """The sizes of the run's teachers by task (empty with stored targets), and the teachers that had to be loaded.

    The memory of a loaded teacher is part of this process while it is alive, so on a CPU it counts as zero here.

    Raises:
        ConfigError: a configuration cannot be found.
        ValueError: a teacher cannot be loaded.
    """
    sizes: dict[str, TeacherSize] = {}
    loaded: list[Teacher] = []
    images = run.optimization.micro_batch
    if run.distillation is None or run.distillation.targets is not None:
        return sizes, loaded
    for task, settings in run.distillation.taught.items():
        if settings.target.kind in PUBLISHED:
            dtype = run.distillation.teacher_dtype or (run.optimization.precision if on_gpu else "float32")
            sizes[task] = _published(settings.target, images, DTYPES[dtype])
        else:
            teacher = build_teacher(settings.target.kind, settings.target.place, **settings.target.options)
            sizes[task] = _loaded(teacher, images, on_gpu)
            loaded.append(teacher)
    return sizes, loaded


def _published(settings: Target, images: int, dtype: torch.dtype) -> TeacherSize:
    class_name, part, side = PUBLISHED[settings.kind]
    model, config = _skeleton(settings, class_name)
    side = int(settings.options.get("size") or side or config.image_size)
    model.to(dtype)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    fake_parameters(model, fake)
    held = [*model.parameters(), *model.buffers()]
    running: Any = model.get_submodule(part)
    extras = {"interpolate_pos_encoding": True} if settings.kind in FEATURES and side != config.image_size else {}
    with fake:
        pixels = torch.empty(images, 3, side, side, dtype=dtype)
    products = Products("image")
    with torch.no_grad(), around_operations(products.count), LiveBytes(fake, held) as live:
        running(pixels, **extras)
    return TeacherSize(float(sum(t.nbytes for t in held)), float(live.most), products.counts["image"] / images)


def _skeleton(settings: Target, class_name: str) -> tuple[nn.Module, Any]:
    import transformers

    kind, options = settings.kind, settings.options
    trust = bool(options.get("trust_remote_code", False))
    config: Any = sizes_of(settings.place, f"{kind} teacher", str(options.get("subfolder", "")), trust)
    if kind in FEATURES:
        config = getattr(config, "vision_config", config)
    made = getattr(transformers, class_name)
    with torch.device("meta"):
        model: nn.Module = made.from_config(config) if class_name.startswith("Auto") else made(config)
    return model.eval(), config


def _loaded(teacher: Teacher, images: int, on_gpu: bool) -> TeacherSize:
    height, width = getattr(teacher.preprocess, "size", (224, 224))
    products = Products("image")
    with around_operations(products.count):
        teacher(torch.zeros(images, 3, height, width))  # on a CPU, the process keeps the memory of its activations
    weights = sum(t.nbytes for t in teacher.parameters()) if on_gpu else 0
    return TeacherSize(float(weights), 0.0, products.counts["image"] / images)
