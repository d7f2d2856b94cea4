"""Tables of the kinds of teachers, heads and losses, with their import paths and options.

A recipe is checked against these tables before torch is imported. A kind that is not in its table is given as
"module:Class" (a loss as "module:function").
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from difflib import get_close_matches
from inspect import Parameter, signature
from typing import Annotated, Any, Literal, NamedTuple

from annotated_types import Ge
from pydantic import AfterValidator, TypeAdapter, ValidationError

from visper.config.faults import expected

Count = Annotated[int, Ge(1)]


class Kind(NamedTuple):
    """``place`` is the class as "module:Class"; ``options`` are its arguments in a recipe, with their types, or ``Any``
    if the class checks the values itself."""

    place: str
    options: Mapping[str, Any] = {}


def _unchecked(*options: str) -> Mapping[str, Any]:
    return dict.fromkeys(options, Any)


_FEATURES = Kind(
    "visper.distillation.teachers.features:FeaturesTeacher",
    _unchecked("size", "layer", "trust_remote_code", "revision"),
)
TEACHERS: Mapping[str, Kind] = {
    "onnx": Kind(
        "visper.distillation.teachers.onnx:OnnxTeacher",
        _unchecked(
            *("size", "layout", "mean", "std", "input", "output", "output_layout", "grid", "softmax"),
            *("draw", "threads"),
        ),
    ),
    "depth_anything": Kind(
        "visper.distillation.teachers.depth_anything:DepthAnythingTeacher", _unchecked("size", "levels", "revision")
    ),
    "oneformer": Kind(
        "visper.distillation.teachers.oneformer:OneFormerTeacher", _unchecked("size", "draw", "revision")
    ),
    "unclip": Kind(
        "visper.distillation.teachers.unclip:UnClipTeacher",
        _unchecked("subfolder", "processor_subfolder", "draw", "steps", "revision"),
    ),
    "features": _FEATURES,
    "dinov2": _FEATURES,
}
"""The built-in kinds. To add one, add a file to ``distillation/teachers/`` and an entry here."""

OWN_TARGETS = ("encoder", "projector")
"""Targets without a teacher: the input and the output of the student's own projector."""

HEADS: Mapping[str, Kind] = {
    "resampler": Kind(
        "visper.distillation.heads:ResamplerHead",
        {
            "queries": Literal["matrix", "states"],
            "inner": Literal["llm", "target"],
            "mlp": bool,
            "num_queries": Count,
            "depth": Count,
            "heads": Count,
            "head_width": Count,
            "ff_mult": Count,
        },
    ),
    "mlp": Kind(
        "visper.distillation.heads:MlpHead",
        {"depth": Count, "width": Count, "activation": Literal["gelu", "silu", "relu"]},
    ),
    "linear": Kind("visper.distillation.heads:LinearHead"),
    "none": Kind("visper.distillation.heads:NoHead"),
}
"""Heads predict embeddings from hidden states. To add one, add a class to ``distillation/heads.py`` and a line here."""

LOSSES: Mapping[str, str] = {
    "smooth_l1": "visper.distillation.losses:smooth_l1",
    "mse": "visper.distillation.losses:mse",
    "cosine": "visper.distillation.losses:cosine",
    "gram": "visper.distillation.losses:gram",
    "info_nce": "visper.distillation.losses:info_nce",
}
"""Losses compare predicted with target embeddings. To add one, add a function to ``distillation/losses.py`` and a line
here."""

_OWN_KIND = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def class_place(kind: str) -> str:
    """The class of a kind of teacher, as "module:Class". Raises ValueError for an unknown kind."""
    if kind in TEACHERS:
        return TEACHERS[kind].place
    return _own_place("target", kind, [*TEACHERS, *OWN_TARGETS], "Class")


def head_place(kind: str) -> str:
    """The class of a kind of head, as "module:Class". Raises ValueError for an unknown kind."""
    return HEADS[kind].place if kind in HEADS else _own_place("head", kind, list(HEADS), "Class")


def loss_place(kind: str) -> str:
    """A loss as "module:function". Raises ValueError for an unknown one."""
    return LOSSES[kind] if kind in LOSSES else _own_place("loss", kind, list(LOSSES), "function")


def check_losses(losses: Collection[str]) -> None:
    """Raises ValueError for an unknown loss, or for two with the same name in the log."""
    for kind in losses:
        loss_place(kind)
    if len({loss_name(kind) for kind in losses}) < len(losses):
        raise ValueError(f"losses {list(losses)} share a name in the log: rename your own function")


def loss_name(kind: str) -> str:
    """The name of a loss in the log: its key in ``LOSSES``, or the name of a custom function."""
    return kind.rsplit(":")[-1]


def _own_place(what: str, kind: str, known: list[str], member: str) -> str:
    if not _OWN_KIND.fullmatch(kind):
        raise ValueError(f"unknown {what} '{kind}': " + nearest(kind, [*known, f"module:{member} of your own"]))
    return kind


def check_head(kind: str, options: Mapping[str, object]) -> None:
    """Raises ValueError for an unknown kind of head, an unknown option, or an option of the wrong type."""
    head_place(kind)
    if kind in HEADS:  # a custom class checks its own options when it is built
        check_options(f"head '{kind}'", options, HEADS[kind].options)


def check_options(what: str, options: Mapping[str, object], known: Mapping[str, Any]) -> None:
    """Raises ValueError for an option that is not in ``known`` (option -> its type), or of the wrong type."""
    for name, value in options.items():
        if name not in known:
            raise ValueError(f"{what} has no option '{name}': " + nearest(name, list(known)))
        try:
            TypeAdapter(known[name]).validate_python(value, strict=True)
        except ValidationError as error:
            wanted = expected(error.errors()[0])
            raise ValueError(f"{what}: option '{name}': {wanted}, found {value!r}") from error


def check_arguments(what: str, own: Callable[..., Any], given: Sequence[str], options: Mapping[str, object]) -> None:
    """Raises ValueError if ``own``, a class of the user's, does not take the arguments ``given`` and these options."""
    parameters = signature(own).parameters
    if not any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters.values()):
        check_options(what, options, dict.fromkeys(list(parameters)[len(given) :], Any))
    try:
        signature(own).bind(*given, **options)
    except TypeError as error:
        raise ValueError(
            f"{what} must be built from {', '.join(given)} and its options in the recipe: {error}"
        ) from error


def check_task_name(name: str) -> str:
    """``name``; raises ValueError if it cannot be a key of torch's ``ModuleDict`` or ``ParameterDict``."""
    if not name.isidentifier() or hasattr(dict, name):
        raise ValueError(
            f"'{name}' cannot name a task: use letters, digits and _, do not begin with a digit, and avoid names of "
            "dict methods, such as 'keys'"
        )
    return name


TaskName = Annotated[str, AfterValidator(check_task_name)]


def nearest(name: str, known: list[str]) -> str:
    """A hint for a message about an unknown name: the closest known name, or all of them."""
    near = get_close_matches(name, known, n=1)
    return f"did you mean '{near[0]}'?" if near else f"expected one of {', '.join(known) or '(none)'}"
