"""Teachers by kind. A new kind is one file here and one entry of ``TEACHERS`` (``config/kinds.py``).

A kind's module is imported only when it is used, so that the packages of other kinds need not be installed.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from visper.common.console import without_loading_bars
from visper.common.importing import import_named
from visper.config.kinds import TEACHERS, check_arguments, class_place
from visper.distillation.teachers.base import SquashedImage, TargetSpec, Teacher, pca_images
from visper.model.hub import remedy

__all__ = ["TEACHERS", "SquashedImage", "TargetSpec", "Teacher", "build_teacher", "pca_images", "target_spec"]

EXTRAS: Mapping[str, str] = {"onnxruntime": "onnx", "onnx": "onnx", "timm": "timm", "diffusers": "diffusion"}
"""Optional package -> the extra of visper-lm that installs it."""


@without_loading_bars()
def build_teacher(kind: str, model: str | Path, **options: Any) -> Teacher:
    """Loads a frozen teacher.

    Args:
        kind: a key of ``TEACHERS``, or "module:Class" of a teacher of your own.
        model: hub id, folder or file, depending on the kind. No other model is ever loaded in its place.
        **options: keyword arguments of the kind's class.

    Raises:
        ValueError: unknown kind, an option the kind does not have, or weights that cannot be loaded.
        ImportError: the kind needs a package that is not installed; the message names the extra.
    """
    with _explained(kind, model):
        teacher = _class_of(kind, options)(model, **options)
    missing = [name for name in ("spec", "preprocess") if not hasattr(teacher, name)]
    if missing:
        raise ValueError(f"teacher kind '{kind}' has no '{missing[0]}': set it in __init__ (docs/teachers.md)")
    return teacher.freeze()


def target_spec(kind: str, model: str | Path, **options: Any) -> TargetSpec:
    """The shape of a teacher's targets. The published kinds read it from a configuration, without loading weights.

    Arguments and errors as in ``build_teacher``; also ConfigError if a configuration cannot be loaded.
    """
    with _explained(kind, model):
        return _class_of(kind, options).planned_spec(model, **options)


def _class_of(kind: str, options: Mapping[str, Any]) -> type[Teacher]:
    place = class_place(kind)
    teacher_class = import_named(place)
    if not (isinstance(teacher_class, type) and issubclass(teacher_class, Teacher)):
        raise ValueError(
            f"teacher kind '{kind}' names {place}, expected a subclass of visper.distillation.teachers.Teacher"
        )
    if abstract := getattr(teacher_class, "__abstractmethods__", None):
        raise ValueError(f"teacher kind '{kind}' has no {', '.join(sorted(abstract))}: define it (docs/teachers.md)")
    check_arguments(f"teacher kind '{kind}'", teacher_class, ("model",), options)
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
