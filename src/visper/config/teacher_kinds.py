"""Kinds of teachers: their classes and options, as data, so that a recipe is checked before torch is imported."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import NamedTuple


class TeacherKind(NamedTuple):
    """``place`` is the class as "module:Class"; ``options`` are its arguments besides ``model`` (a test compares)."""

    place: str
    options: tuple[str, ...] = ()


TEACHERS: Mapping[str, TeacherKind] = {
    "onnx": TeacherKind(
        "visper.distillation.teachers.onnx:OnnxTeacher",
        (
            *("size", "layout", "mean", "std", "input", "output", "output_layout", "grid", "softmax"),
            *("draw", "threads"),
        ),
    ),
    "depth_anything": TeacherKind(
        "visper.distillation.teachers.depth_anything:DepthAnythingTeacher", ("size", "revision")
    ),
    "oneformer": TeacherKind("visper.distillation.teachers.oneformer:OneFormerTeacher", ("size", "draw", "revision")),
    "unclip": TeacherKind(
        "visper.distillation.teachers.unclip:UnClipTeacher",
        ("subfolder", "processor_subfolder", "draw", "steps", "revision"),
    ),
    "features": TeacherKind(
        "visper.distillation.teachers.features:FeaturesTeacher",
        ("size", "layer", "trust_remote_code", "revision"),
    ),
}
"""The kinds that come with visper. Another one is a file in ``distillation/teachers/`` and an entry here."""

_OWN_KIND = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def class_place(kind: str) -> str:
    """Where a kind's class is, as "module:Class". Raises ValueError for an unknown kind."""
    if kind in TEACHERS:
        return TEACHERS[kind].place
    if not _OWN_KIND.fullmatch(kind):
        raise ValueError(
            f"unknown teacher kind '{kind}': " + nearest(kind, [*TEACHERS, "module:Class for a class of your own"])
        )
    return kind


def check_options(kind: str, options: Mapping[str, object], known: tuple[str, ...]) -> None:
    """Raises ValueError for an option that the kind of teacher does not have."""
    for name in options:
        if name not in known:
            raise ValueError(f"teacher kind '{kind}' has no option '{name}': " + nearest(name, list(known)))


def nearest(name: str, known: list[str]) -> str:
    """The hint at the end of a message about an unknown name."""
    near = get_close_matches(name, known, n=1)
    return f"did you mean '{near[0]}'?" if near else f"expected one of {', '.join(known) or '(none)'}"
