"""VisPer: visual supervision for multimodal LLMs.

The public names are imported on first use: ``import visper`` alone loads neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from visper.common.errors import ConfigError, DataError, VisperError
    from visper.config import Run, load_run
    from visper.distillation import attach
    from visper.model import Student, load_student
    from visper.training import run_pipeline, run_stage

_HOMES = {
    "ConfigError": "visper.common.errors",
    "DataError": "visper.common.errors",
    "Run": "visper.config",
    "Student": "visper.model",
    "VisperError": "visper.common.errors",
    "attach": "visper.distillation",
    "load_run": "visper.config",
    "load_student": "visper.model",
    "run_pipeline": "visper.training",
    "run_stage": "visper.training",
}
"""Public name -> the module it is imported from."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version  # takes a sixth of the time of `visper --help`

    try:
        return version("visper-lm")
    except PackageNotFoundError:  # the package is not installed
        return "0+unknown"


def __dir__() -> list[str]:
    return __all__


__all__ = [
    "ConfigError",
    "DataError",
    "Run",
    "Student",
    "VisperError",
    "__version__",
    "attach",
    "load_run",
    "load_student",
    "run_pipeline",
    "run_stage",
]
