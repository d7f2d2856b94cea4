"""What a run is: typed, validated, free of torch."""

from visper.config.errors import ConfigError
from visper.config.load import explain, load_run, parse_overrides, read_recipe, recipe_names, run_text, save_run
from visper.config.schema import (
    Data,
    Distillation,
    Engine,
    Geometry,
    Launch,
    Logging,
    Lora,
    Optimisation,
    Run,
    Source,
    Stage,
    Student,
    Task,
    TaskTokenLayout,
    Teacher,
    Watch,
)

__all__ = [
    "ConfigError",
    "Data",
    "Distillation",
    "Engine",
    "Geometry",
    "Launch",
    "Logging",
    "Lora",
    "Optimisation",
    "Run",
    "Source",
    "Stage",
    "Student",
    "Task",
    "TaskTokenLayout",
    "Teacher",
    "Watch",
    "explain",
    "load_run",
    "parse_overrides",
    "read_recipe",
    "recipe_names",
    "run_text",
    "save_run",
]
