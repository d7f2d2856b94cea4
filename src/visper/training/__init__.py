"""Losses become weights."""

from visper.training.launch import start_processes
from visper.training.module import TrainingModel
from visper.training.run import is_finished, run_pipeline, run_stage
from visper.training.stages import TRAINABLE, apply_stage, count_parts
from visper.training.trainer import StageTrainer
from visper.training.watch import NonFiniteLossError

__all__ = [
    "TRAINABLE",
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
