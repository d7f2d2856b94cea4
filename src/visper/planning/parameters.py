"""A run's student at full size without weights (on the meta device), and its parameter counts by part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from visper.common.errors import ConfigError
from visper.config import Run, Stage, VlmStudent, load_run, recipe_names
from visper.distillation.teachers.tasks import planned_specs
from visper.model import Student, build_skeleton, load_student
from visper.model.vlm import build_vlm
from visper.planning.fake_step import FakeTensorMode, fake_parameters
from visper.training.assemble import build_training_model, choose_trainable
from visper.training.stages import count_parts


@dataclass(frozen=True)
class PartSize:
    """The number of parameters of one part, and how many are trainable in each stage."""

    part: str
    total: int
    trainable: Mapping[Stage, int]


def part_sizes(run: Run) -> list[PartSize]:
    """Parameter counts of every part of ``run``'s model, at full size, by the table in ``training.stages``.

    The run of a later stage is followed back to the run that assembles the student. The optimization settings and
    embedding losses of ``run`` apply to its own stage only; if it has no losses, those of the first stage apply to PT.

    Raises:
        ConfigError: the first stage or a part's configuration cannot be found, or a target does not fit its head.
    """
    first = first_stage(run)
    supervised = run if run.distillation is not None else first
    specs = planned_specs(supervised.distillation)
    totals: dict[str, int] = {}
    trainable: dict[str, dict[Stage, int]] = {}
    for stage in Stage:  # PT comes first: it has the predictors and the full query matrices
        others: dict[str, Any] = {} if stage is run.stage else {"freeze": (), "train": (), "lr_overrides": {}}
        distillation = supervised.distillation if stage is supervised.stage else None
        with torch.device("meta"):
            model = build_training_model(student_skeleton(first), stage, distillation, specs)
        fake_parameters(model, FakeTensorMode(allow_non_fake_inputs=True))
        choose_trainable(model, stage, run.optimization.model_copy(update=others))
        for count in count_parts(model):
            totals.setdefault(count.part, count.total)
            trainable.setdefault(count.part, dict.fromkeys(Stage, 0))[stage] = count.trainable
    return [PartSize(part, total, trainable[part]) for part, total in totals.items() if total]


def first_stage(run: Run) -> Run:
    """The first run of the chain that leads to ``run``: it has a 'student', or starts from a plain LLaVA folder.

    Raises:
        ConfigError: a folder that a run starts from does not exist yet and no shipped recipe makes it.
    """
    while run.start_from is not None:
        written = Path(run.start_from) / "run.yaml"
        if written.is_file():
            run = load_run(written)
            continue
        if _has_model(run):
            return run
        makers = [recipe for recipe in map(load_run, recipe_names()) if recipe.output == run.start_from]
        if not makers:
            raise ConfigError(
                f"'{run.name}' starts from '{run.start_from}', which does not exist and which no shipped recipe makes: "
                "give the recipe of its first stage instead, the one with a 'student'"
            )
        run = makers[0]
    return run


def starting_point(run: Run) -> Run:
    """The run that provides the student of ``run``: itself if that student exists, else the first stage.

    Raises:
        ConfigError: see ``first_stage``.
    """
    return run if _has_model(run) else first_stage(run)


def student_skeleton(start: Run) -> Student:
    """The student that ``start`` begins with, without weights: built from configurations or from its start folder.

    Raises:
        ConfigError: a configuration cannot be found.
    """
    if isinstance(start.student, VlmStudent):
        return build_vlm(start.student, skeleton=True)
    if start.student is not None:
        return build_skeleton(start.student)
    assert start.start_from is not None
    return load_student(start.start_from, revision=start.start_from_revision, device_map="meta")


def _has_model(run: Run) -> bool:
    if run.start_from is None:
        return False
    return any((Path(run.start_from) / part / "config.json").is_file() for part in ("", "model"))
