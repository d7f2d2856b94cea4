"""The student: encoder, projector, LLM and task tokens."""

from visper.model.build import Student, build_skeleton, build_student, initial_queries, load_student, save_student
from visper.model.encoders import Encoder, FeatureMapTower, FeatureMapTowerConfig, load_encoder
from visper.model.task_tokens import TaskTokens, random_rows, task_token_names

__all__ = [
    "Encoder",
    "FeatureMapTower",
    "FeatureMapTowerConfig",
    "Student",
    "TaskTokens",
    "build_skeleton",
    "build_student",
    "initial_queries",
    "load_encoder",
    "load_student",
    "random_rows",
    "save_student",
    "task_token_names",
]
