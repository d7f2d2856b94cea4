"""The configuration of a run: typed, validated, without importing torch."""

from visper.config.data import Data, Geometry, Source
from visper.config.distillation import PUBLISHED_LOSS, Distillation, Head, Position, Target, Task
from visper.config.explain import explain
from visper.config.load import load_run, parse_overrides, read_recipe, recipe_names, run_text, save_run
from visper.config.schema import (
    EVALUATED,
    JOINING_ATTENTION,
    Engine,
    Evaluation,
    Launch,
    Logging,
    Lora,
    Monitor,
    Optimization,
    Run,
    Stage,
)
from visper.config.student import Student, TaskTokenLayout, VlmStudent

__all__ = [
    "EVALUATED",
    "JOINING_ATTENTION",
    "PUBLISHED_LOSS",
    "Data",
    "Distillation",
    "Engine",
    "Evaluation",
    "Geometry",
    "Head",
    "Launch",
    "Logging",
    "Lora",
    "Monitor",
    "Optimization",
    "Position",
    "Run",
    "Source",
    "Stage",
    "Student",
    "Target",
    "Task",
    "TaskTokenLayout",
    "VlmStudent",
    "explain",
    "load_run",
    "parse_overrides",
    "read_recipe",
    "recipe_names",
    "run_text",
    "save_run",
]
