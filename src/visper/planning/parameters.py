"""How large a recipe's model is and what each stage would train, without its weights: everything on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from visper.common.errors import ConfigError
from visper.config import Run, Stage, load_run, recipe_names
from visper.distillation.teachers.tasks import planned_teachers
from visper.model import build_skeleton
from visper.training.assemble import build_training_model, choose_trainable
from visper.training.stages import count_parts


@dataclass(frozen=True)
class PartSize:
    """Parameters of one part: all of them, and how many learn in each stage."""

    part: str
    total: int
    learning: Mapping[Stage, int]


def part_sizes(run: Run) -> list[PartSize]:
    """Every part of the model that ``run`` belongs to, at full size, by the table of ``training.stages``.

    A later stage's run is followed back to the one that assembles the student. ``optimization.freeze`` counts in the
    run's own stage.

    Raises:
        ConfigError: the first stage or a part's configuration cannot be had, or a task fits no predictor.
    """
    first = first_stage(run)
    assert first.student is not None
    teachers = planned_teachers(first.distillation)
    student = build_skeleton(first.student)
    totals: dict[str, int] = {}
    learning: dict[str, dict[Stage, int]] = {}
    for stage in Stage:  # pt first: it has the predictors and the whole query matrices
        freeze = run.optimization.freeze if stage is run.stage else ()
        changes = {"stage": stage, "optimization": run.optimization.model_copy(update={"freeze": freeze})}
        distillation = first.distillation if stage is Stage.PT else None
        staged = first.model_copy(update={**changes, "distillation": distillation})
        with torch.device("meta"):
            model = build_training_model(student, stage, distillation, teachers)
        choose_trainable(model, stage, staged.optimization, staged.lora is not None)
        for count in count_parts(model):
            totals.setdefault(count.part, count.total)
            learning.setdefault(count.part, dict.fromkeys(Stage, 0))[stage] = count.trainable
    return [PartSize(part, total, learning[part]) for part, total in totals.items() if total]


def first_stage(run: Run) -> Run:
    """The run that assembles the student ``run`` starts from: itself, or found through the folders it starts from.

    Raises:
        ConfigError: such a folder is not there yet and no shipped recipe makes it.
    """
    while run.start_from is not None:
        written = Path(run.start_from) / "run.yaml"
        if written.is_file():
            run = load_run(written)
            continue
        makers = [recipe for recipe in map(load_run, recipe_names()) if recipe.output == run.start_from]
        if not makers:
            raise ConfigError(
                f"'{run.name}' starts from '{run.start_from}', which is not there and which no shipped recipe makes: "
                "ask for the recipe of its first stage, the one with a 'student'"
            )
        run = makers[0]
    return run
