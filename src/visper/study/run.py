"""Runs the arms: pre-training once an arm and seed, fine-tuning from it for every number of labels, questions."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from visper.common.console import Console, announce
from visper.common.errors import ConfigError, TrainingError
from visper.common.files import atomic_path, write_text
from visper.config import Run, load_run
from visper.evaluation import evaluate, load_to_ask, read_questions, save_answers
from visper.evaluation.predictions import load_pre_trained
from visper.quickstart.probed import world_findings
from visper.quickstart.run import Stopwatch, copy_bases
from visper.quickstart.scenes import draw_scene
from visper.study.arms import ARMS, FEEDING, NOTHING, PUBLISHED, Arm
from visper.study.controls import save_tower
from visper.study.world import NEAREST, write_study_world
from visper.training import is_finished, run_stage

CHOOSING_SEED = 1000
"""Weights are chosen on its world; it is not reported."""
TOWERS = {"tower": (), "tower_fed": ("teacher_depth", "teacher_seg")}
"""What projectors read, by folder among the bases -> the teachers whose tokens it holds."""
WEIGHTS = (0.1, 0.5)
"""What is tried for every arm with embedding losses; of all its tasks."""


@dataclass(frozen=True)
class Size:
    """How much of everything.

    Attributes:
        scenes, more: of pre-training, and of the arm with more data.
        labels: number of questions to fine-tune on -> steps.
        chosen_at: the number of labels at which weights are compared.
        judged: scenes whose predictions are compared with their teachers.
        margin: how much more, of 1, feature feeding must answer than no supervision for the setting to show anything.
    """

    scenes: int
    more: int
    held_out: int
    per_kind: int
    pt_steps: int
    labels: Mapping[int, int]
    chosen_at: int
    judged: int
    margin: float


FULL = Size(4000, 8000, 600, 250, 600, {250: 60, 1000: 120, 4000: 180, 16000: 300}, 1000, 150, 0.05)
FAST = Size(60, 80, 30, 4, 4, {20: 2, 40: 3}, 20, 8, -1.0)


@dataclass(frozen=True)
class Cell:
    """One arm with one seed and one weight of its embedding losses."""

    out: Path
    arm: Arm
    seed: int
    size: Size
    weight: float | None = None

    @property
    def place(self) -> Path:
        """The folder of its runs and results."""
        name = self.arm.name.replace(",", "").replace(" ", "-")
        return self.out / f"seed-{self.seed}" / (name if self.weight is None else f"{name}-{self.weight:g}")

    @property
    def world(self) -> Path:
        """The scenes and questions of its seed."""
        return self.out / f"seed-{self.seed}" / "world"

    @property
    def result(self) -> Path:
        """The file of its results."""
        return self.place / "result.json"


def study(
    out: Path, seeds: Sequence[int], size: Size, console: Console, arms: Sequence[str] = tuple(ARMS)
) -> dict[str, Any]:
    """Chooses weights, then runs every arm with every seed; what is finished is read, not run again.

    Returns:
        The results of all cells: ``{arm: {seed: result}}``, see ``run_cell``.

    Raises:
        ConfigError: no arm has such a name; the one without supervision is not named; ``out`` holds another size.
        TrainingError: the setting can show nothing, see ``require_upper_mark``.
    """
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise ConfigError(f"--arm {', '.join(unknown)}: expected some of {', '.join(ARMS)}")
    if NOTHING not in arms:
        raise ConfigError(f"--arm {', '.join(arms)}: every arm is compared with '{NOTHING}': name it, too")
    _require_size(out, size)
    _prepare_bases(out / "bases")
    results: dict[str, Any] = {arm: {} for arm in arms}
    require_upper_mark(out, size, console)
    weights = choose_weights(out, size, [ARMS[name] for name in arms], console)
    for seed in seeds:
        for name in arms:
            cell = Cell(out, ARMS[name], seed, size, weights.get(name))
            results[name][seed] = run_cell(cell, weights, console)
    return results


def require_upper_mark(out: Path, size: Size, console: Console) -> None:
    """Refuses a setting in which the teachers' features do not help as input: learning to predict them could not.

    Judged on the choosing seed, so that no reported run decides which setting is reported.

    Raises:
        TrainingError: names both accuracies.
    """
    small = _at_one_number(size)
    without, fed = (
        mean_accuracy(run_cell(Cell(out, ARMS[arm], CHOOSING_SEED, small), {}, console)["labels"][str(size.chosen_at)])
        for arm in (NOTHING, FEEDING)
    )
    if fed - without < size.margin:
        raise TrainingError(
            f"with {size.chosen_at} labels '{FEEDING}' answers {fed:.1%} of the questions, '{NOTHING}' {without:.1%}: "
            f"expected {100 * size.margin:.0f} points more at least, as otherwise no arm can be told from another; "
            "pre-train longer (study.run.FULL)"
        )


def _at_one_number(size: Size) -> Size:
    return replace(size, labels={size.chosen_at: size.labels[size.chosen_at]})


def choose_weights(out: Path, size: Size, arms: Sequence[Arm], console: Console) -> dict[str, float]:
    """Arm -> weight of its losses: of ``WEIGHTS`` the one with which it answers most questions on the choosing seed."""
    chosen = {}
    for arm in arms:
        if arm.supervised is None:
            continue
        cells = {weight: Cell(out, arm, CHOOSING_SEED, _at_one_number(size), weight) for weight in WEIGHTS}
        found = {w: run_cell(cell, {}, console)["labels"][str(size.chosen_at)] for w, cell in cells.items()}
        chosen[arm.name] = max(found, key=lambda weight: mean_accuracy(found[weight]))
    return chosen


def mean_accuracy(kinds: Mapping[str, Sequence[int]]) -> float:
    """Mean over the kinds that training asks of ``{kind: [right, asked]}``."""
    return statistics.fmean(right / asked for kind, (right, asked) in kinds.items() if kind != NEAREST)


def run_cell(cell: Cell, weights: Mapping[str, float], console: Console) -> dict[str, Any]:
    """Trains and asks one cell, continuing where it stopped.

    Returns:
        ``labels``: number of labels -> kind -> [right, asked]; ``cosines``: layer -> [centered cosine, the same with
        another scene's target]; ``cpu_seconds`` and ``steps`` by stage.
    """
    if cell.result.exists():
        return dict(json.loads(cell.result.read_text(encoding="utf-8")))
    _prepare_world(cell, console)
    seconds = Stopwatch(cell.place / "seconds.json")
    pt = pre_training(cell, weights)
    _train(pt, seconds if cell.arm.own_pt or cell.arm.name == NOTHING else None, "pt", console)
    answered, cosines = {}, _cosines(pt, cell)
    for labels in cell.size.labels:
        ift = fine_tuning(cell, pt, labels)
        _train(ift, seconds, f"ift-{labels}", console)
        answered[str(labels)] = _ask(cell, Path(ift.output))
        cosines |= _cosines(ift, cell) if labels == max(cell.size.labels) else {}
    result = {
        "arm": cell.arm.name,
        "seed": cell.seed,
        "weight": cell.weight,
        "labels": answered,
        "cosines": cosines,
        "cpu_seconds": seconds.cpu,
        "steps": {"pt": pt.optimization.max_steps, **{f"ift-{n}": steps for n, steps in cell.size.labels.items()}},
    }
    write_text(cell.result, json.dumps(result, indent=1))
    return result


def pre_training(cell: Cell, weights: Mapping[str, float]) -> Run:
    """The recipe of a cell's pre-training; an arm that differs in fine-tuning alone shares that without supervision."""
    own = cell if cell.arm.own_pt else Cell(cell.out, ARMS[NOTHING], cell.seed, cell.size)
    arm, bases = own.arm, cell.out / "bases"
    steps = cell.size.pt_steps if not arm.equal_compute else equal_compute_steps(own, weights)
    json_file = cell.world / ("pretrain_more.json" if arm.more else "pretrain.json")
    changes: dict[str, Any] = {
        "seed": cell.seed,
        "output": str(own.place / "pt"),
        "student": {"llm": str(bases / "llm"), "encoder": str(bases / arm.encoder)},
        "data": {"sources": [{"json": str(json_file), "images": str(cell.world / "images")}]},
        "optimization": {"max_steps": steps},
    }
    return load_run(arm.pt, changes=(_objective(arm.pt, bases, cell.weight), changes))


def fine_tuning(cell: Cell, pt: Run, labels: int) -> Run:
    """The recipe of a cell's fine-tuning on a number of labels."""
    json_file = cell.world / f"instruct_{labels}.json"
    changes: dict[str, Any] = {
        "seed": cell.seed,
        "output": str(cell.place / f"ift-{labels}"),
        "start_from": str(pt.output),
        "data": {"sources": [{"json": str(json_file), "images": str(cell.world / "images")}]},
        "optimization": {"max_steps": cell.size.labels[labels]},
    }
    return load_run(cell.arm.ift, changes=(_objective(cell.arm.ift, cell.out / "bases", cell.weight), changes))


def equal_compute_steps(cell: Cell, weights: Mapping[str, float]) -> int:
    """Steps without losses that take the processor seconds of the published method's, as measured with this seed."""
    arms = (
        Cell(cell.out, ARMS[NOTHING], cell.seed, cell.size),
        Cell(cell.out, ARMS[PUBLISHED], cell.seed, cell.size, weights.get(PUBLISHED)),
    )
    if missing := [one.arm.name for one in arms if not one.result.exists()]:
        raise ConfigError(
            f"arm '{cell.arm.name}' needs the cost of {', '.join(missing)}: name these by --arm, before it"
        )
    base, published = (json.loads(one.result.read_text(encoding="utf-8"))["cpu_seconds"]["pt"] for one in arms)
    return round(cell.size.pt_steps * published / base)


def _objective(recipe: str, bases: Path, weight: float | None) -> dict[str, Any]:
    """The recipe's tasks with the bases' folders and the chosen weight."""
    section = load_run(recipe).distillation
    if section is None:
        return {}
    tasks: dict[str, Any] = {name: {} if weight is None else {"weight": weight} for name in section.tasks}
    for name, task in section.taught.items():
        tasks[name]["target"] = {"model": str(bases / Path(task.target.place).name)}
    return {"distillation": {"tasks": tasks}}


def _train(run: Run, seconds: Stopwatch | None, part: str, console: Console) -> None:
    """Trains a stage that is not finished, from its first step: it takes minutes, and its processor seconds, by which
    arms of equal compute are made, must be those of all steps."""
    if is_finished(run):
        return
    shutil.rmtree(run.output, ignore_errors=True)
    announce(console, "train", str(run.output))
    with seconds(part) if seconds is not None else nullcontext():
        run_stage(run)


def _ask(cell: Cell, model: Path) -> dict[str, list[int]]:
    """Kind -> [right, asked] of a fine-tuned model; raw answers are kept."""
    questions = read_questions(cell.world / "questions.json")
    answered = evaluate(load_to_ask(model), questions, cell.world / "images", batch_size=64, max_new_tokens=4)
    save_answers(cell.place / f"{model.name}.jsonl", answered)
    kinds = {
        kind: [row.correct for row in answered if row.kind == kind] for kind in dict.fromkeys(q.kind for q in questions)
    }
    return {kind: [sum(rows), len(rows)] for kind, rows in kinds.items()}


def _cosines(run: Run, cell: Cell) -> dict[str, list[float]]:
    """Layer -> [centered cosine of predictions and targets, the same with another scene's]; none without a predictor
    of a teacher's tokens."""
    taught = run.distillation.taught if run.distillation is not None else {}
    if not taught or any(task.head.kind == "none" for task in taught.values()):
        return {}
    found = world_findings(load_pre_trained(run.output), cell.world, cell.size.judged)
    return {f.name: [f.value, *f.controls.values()] for f in found if f.measure.startswith("cosine")}


def _prepare_world(cell: Cell, console: Console) -> None:
    if cell.world.exists():
        return
    cell.world.parent.mkdir(parents=True, exist_ok=True)
    size = cell.size
    announce(console, "world", f"{size.more} scenes to learn from, {size.held_out} held out, into {cell.world}")
    write_study_world(
        cell.world,
        seed=cell.seed,
        scenes=size.scenes,
        more=size.more,
        labels=tuple(size.labels),
        held_out=size.held_out,
        per_kind=size.per_kind,
    )


def _prepare_bases(bases: Path) -> None:
    copy_bases(bases)
    missing = {name: teachers for name, teachers in TOWERS.items() if not (bases / name).exists()}
    if not missing:
        return
    images = np.stack([draw_scene(CHOOSING_SEED, index).image for index in range(100)])
    pixels = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25
    for name, teachers in missing.items():
        with atomic_path(bases / name) as partial:
            partial.mkdir()
            save_tower(bases / "encoder_contrastive", [bases / teacher for teacher in teachers], pixels, partial)


def _require_size(out: Path, size: Size) -> None:
    file, wanted = out / "size.json", json.loads(json.dumps(asdict(size)))
    if not file.exists():
        out.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(wanted, indent=1))
    elif json.loads(file.read_text(encoding="utf-8")) != wanted:
        raise ConfigError(f"'{out}' holds a study of another size: choose another --out, or remove it")
