"""The student: encoder, projector, LLM and task tokens."""

from visper.model.build import assemble_student, build_processor, build_skeleton, build_student
from visper.model.encoders import Encoder, FeatureMapTower, FeatureMapTowerConfig, load_encoder
from visper.model.student import (
    Student,
    initial_queries,
    load_processor,
    load_student,
    save_processor,
    save_student,
)
from visper.model.task_tokens import TaskTokens, random_rows, task_token_names
from visper.model.words import AddedWords

__all__ = [
    "AddedWords",
    "Encoder",
    "FeatureMapTower",
    "FeatureMapTowerConfig",
    "Student",
    "TaskTokens",
    "assemble_student",
    "build_processor",
    "build_skeleton",
    "build_student",
    "initial_queries",
    "load_encoder",
    "load_processor",
    "load_student",
    "random_rows",
    "save_processor",
    "save_student",
    "task_token_names",
]
