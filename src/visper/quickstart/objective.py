"""Applies any recipe's objective to the quickstart's student: same positions, heads, losses, weights and schedule.

Layers and widths are scaled in proportion to the LLM, and teachers are replaced by those of the offline world.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig

from visper.common.errors import ConfigError
from visper.config import Run, Stage, Task, load_run
from visper.config import Student as StudentConfig
from visper.data.images import student_pixels
from visper.distillation import InputTap
from visper.evaluation.predictions import teacher_targets
from visper.model import Student
from visper.model.hub import sizes_of
from visper.model.parts import PROJECTOR, modules_of
from visper.planning.parameters import first_stage
from visper.quickstart.tower import TowerTeacher

GRID_TEACHERS = ("depth", "seg")
"""The offline world's teachers with a map, in the order in which they are assigned to a recipe's tasks. "gen" has none:
it has one token."""
Source = Callable[[Sequence[Image.Image]], Tensor]
"""Images -> targets ``[S, N, E]``."""


def scaled_objective(recipe: str | Path, bases: Path) -> tuple[Stage, dict[str, Any], dict[str, Any] | None]:
    """The stage of a recipe, its section 'distillation' scaled to the quickstart's bases, and its task tokens.

    Raises:
        ConfigError: the recipe has no objective, supervises a stage that the quickstart lacks, or has no student of LLM
            and encoder to scale from.
    """
    run = load_run(recipe)
    if run.distillation is None or run.stage not in (Stage.PT, Stage.IFT):
        raise ConfigError(
            f"--objective {recipe}: expected a recipe of stage pt or ift with 'distillation', found stage "
            f"'{run.stage}'{'' if run.distillation else ' without'}: choose another, such as visual/viral"
        )
    student = first_stage(run).student
    if not isinstance(student, StudentConfig):
        raise ConfigError(
            f"--objective {recipe}: its layers are those of '{run.start_from}', expected a student with llm and encoder"
        )
    theirs: Any = sizes_of(student.llm, "student.llm", revision=student.llm_revision).get_text_config()
    ours = AutoConfig.from_pretrained(bases / "llm")
    depth, width = ours.num_hidden_layers / theirs.num_hidden_layers, ours.hidden_size / theirs.hidden_size
    tasks = {
        name: _scaled(task, at, depth, width, bases) for at, (name, task) in enumerate(run.distillation.tasks.items())
    }
    section = run.distillation.model_dump(mode="json", exclude={"tasks", "targets", "teacher_dtype"})
    tokens = (
        student.task_tokens.model_dump(mode="json") if student.task_tokens and run.distillation.at_task_tokens else None
    )
    return run.stage, {**section, "tasks": tasks}, tokens


def _scaled(task: Task, at: int, depth: float, width: float, bases: Path) -> dict[str, Any]:
    layers = list(dict.fromkeys(max(1, round(layer * depth)) for layer in task.layers))
    head = task.head.model_dump(mode="json")
    if head.get("width"):
        head["width"] = max(16, round(head["width"] * width))
    target = task.target.model_dump(mode="json")
    if not task.target.own:
        place = bases / f"teacher_{GRID_TEACHERS[at % len(GRID_TEACHERS)]}"
        target = {"kind": "visper.quickstart.tower:TowerTeacher", "model": str(place)}
    return {**task.model_dump(mode="json"), "layers": layers, "head": head, "target": target}


def sources_of(run: Run, student: Student | None, teachers: Mapping[str, TowerTeacher]) -> dict[str, Source]:
    """A source of targets for each task: its teacher, or the features of ``student`` for targets of its own parts."""
    assert run.distillation is not None
    sources: dict[str, Source] = {}
    for name, task in run.distillation.tasks.items():
        if task.target.own:
            assert student is not None
            sources[name] = partial(_own_features, student, task.target.kind)
        else:
            sources[name] = partial(teacher_targets, teachers[name])
    return sources


def drawing_teachers(run: Run) -> Mapping[str, TowerTeacher]:
    """The teachers of a run, by task; they can draw their maps."""
    assert run.distillation is not None
    return {name: TowerTeacher(Path(task.target.place)) for name, task in run.distillation.taught.items()}


@torch.no_grad()
def _own_features(student: Student, kind: str, images: Sequence[Image.Image]) -> Tensor:
    """Features of the student's own encoder or projector, as targets."""
    model: Any = student.model
    pixels = torch.stack([student_pixels(student.processor.image_processor, image) for image in images])
    with InputTap(model.get_submodule(modules_of(model, PROJECTOR)[0])) as encoded:
        projected = torch.stack(list(model.model.get_image_features(pixel_values=pixels).pooler_output))
        return (encoded[0] if kind == "encoder" else projected).float()
