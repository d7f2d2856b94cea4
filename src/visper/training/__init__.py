"""Training: runs one stage, from the data to the finished model folder."""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visper.training.mixin import DistillationMixin
    from visper.training.module import TrainingModel
    from visper.training.monitor import NonFiniteLossError
    from visper.training.output import is_finished
    from visper.training.parallel.launch import start_processes
    from visper.training.run import run_pipeline, run_stage
    from visper.training.stages import TRAINABLE, apply_stage, count_parts
    from visper.training.trainer import StageTrainer

# If DeepSpeed is installed, accelerate imports it in every run, and DeepSpeed then warns on machines without a GPU.
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())

PLACES = {
    "TRAINABLE": "stages",
    "DistillationMixin": "mixin",
    "NonFiniteLossError": "monitor",
    "StageTrainer": "trainer",
    "TrainingModel": "module",
    "apply_stage": "stages",
    "count_parts": "stages",
    "is_finished": "output",
    "run_pipeline": "run",
    "run_stage": "run",
    "start_processes": "parallel.launch",
}
"""Public name -> its module, imported on first access: the Trainer alone pulls in 100 MB of libraries that a
hand-written training step does not need."""


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{PLACES[name]}"), name)


__all__ = [
    "TRAINABLE",
    "DistillationMixin",
    "NonFiniteLossError",
    "StageTrainer",
    "TrainingModel",
    "apply_stage",
    "count_parts",
    "is_finished",
    "run_pipeline",
    "run_stage",
    "start_processes",
]
