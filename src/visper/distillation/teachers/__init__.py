"""Teachers by kind. A new teacher is one file and one entry of ``TEACHERS``.

A kind is imported only when it is asked for, so that nobody needs the packages of teachers they do not use.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

from visper.distillation.teachers.base import SquashedImage, TargetSpec, Teacher, pca_pictures
from visper.model.hub import remedy

__all__ = ["TEACHERS", "SquashedImage", "TargetSpec", "Teacher", "build_teacher", "pca_pictures", "target_spec"]

TEACHERS: dict[str, str] = {
    "onnx": "visper.distillation.teachers.onnx:OnnxTeacher",
    "depth_anything": "visper.distillation.teachers.depth_anything:DepthAnythingTeacher",
    "oneformer": "visper.distillation.teachers.oneformer:OneFormerTeacher",
    "unclip": "visper.distillation.teachers.unclip:UnClipTeacher",
    "features": "visper.distillation.teachers.features:FeaturesTeacher",
}
"""Kind -> "module:Class"."""

EXTRAS: Mapping[str, str] = {"onnxruntime": "onnx", "onnx": "onnx", "timm": "timm", "diffusers": "diffusion"}
"""Package that may be missing -> the extra of this project that brings it."""


def build_teacher(kind: str, model: str | Path, **options: Any) -> Teacher:
    """Loads a frozen teacher.

    Args:
        kind: a key of ``TEACHERS``, or "module:Class" of a teacher of your own.
        model: hub id, folder or file, as the kind wants it. Never replaced by another one.
        **options: the kind's own options, by name.

    Raises:
        ValueError: unknown kind, an option the kind does not have, or weights that cannot be had; the message says why.
        ImportError: the kind needs a package that is not installed; the message names the extra.
    """
    with _explained(kind, model):
        return _class_of(kind, options)(model, **options).freeze()


def target_spec(kind: str, model: str | Path, **options: Any) -> TargetSpec:
    """The shape of a teacher's targets. The published kinds read it from a configuration, without weights.

    Arguments and errors are ``build_teacher``'s; ConfigError where a configuration cannot be had.
    """
    with _explained(kind, model):
        return _class_of(kind, options).planned_spec(model, **options)


def _class_of(kind: str, options: Mapping[str, Any]) -> type[Teacher]:
    place = TEACHERS.get(kind, kind)
    if ":" not in place:
        raise ValueError(f"unknown teacher kind '{kind}': " + _nearest(kind, [*TEACHERS, "module:Class of your own"]))
    module_name, class_name = place.split(":", 1)
    teacher_class = getattr(import_module(module_name), class_name)
    if not (isinstance(teacher_class, type) and issubclass(teacher_class, Teacher)):
        raise ValueError(
            f"teacher kind '{kind}' names {place}, which is no Teacher: subclass visper.distillation.teachers.Teacher"
        )
    known = list(signature(teacher_class).parameters)
    for name in options:
        if name not in known:
            raise ValueError(f"teacher kind '{kind}' has no option '{name}': " + _nearest(name, known[1:]))
    return teacher_class


@contextmanager
def _explained(kind: str, model: str | Path) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        extra = EXTRAS.get(error.name or "")
        if extra is None:
            raise
        raise ImportError(
            f"teacher kind '{kind}' needs the package '{error.name}', which is not installed: "
            f"pip install 'visper-lm[{extra}]'"
        ) from error
    except OSError as error:
        raise ValueError(remedy(str(model), error)) from error


def _nearest(name: str, known: list[str]) -> str:
    near = get_close_matches(name, known, n=1)
    return f"did you mean '{near[0]}'?" if near else f"there are {', '.join(known)}"
