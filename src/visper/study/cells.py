"""One cell of the study: one arm with one seed. Builds its recipes, trains it and scores its answers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from visper.common.console import Console, announce
from visper.common.files import write_text
from visper.common.lock import locked
from visper.config import Run, load_run
from visper.evaluation import evaluate, load_to_ask, read_questions, save_answers
from visper.evaluation.predictions import load_pre_trained
from visper.evaluation.probe.curves import SCORES, read_findings
from visper.evaluation.probe.measures import Finding
from visper.quickstart.probed import probe_world, world_findings
from visper.quickstart.run import Stopwatch
from visper.study.arms import ARMS, NOTHING, PUBLISHED, Arm, Size
from visper.study.world import write_study_world
from visper.training import is_finished, run_stage


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
        """The folder of the cell's runs and results."""
        name = self.arm.name.replace(",", "").replace(" ", "-")
        return self.out / f"seed-{self.seed}" / (name if self.weight is None else f"{name}-{self.weight:g}")

    @property
    def world(self) -> Path:
        """The folder of the seed's scenes and questions."""
        return self.out / f"seed-{self.seed}" / "world"

    @property
    def result(self) -> Path:
        """The file of the cell's results."""
        return self.place / "result.json"


def finished(cell: Cell, weights: Mapping[str, float], console: Console, wait: bool = True) -> dict[str, Any]:
    """The result of a cell: read from disk, or computed first."""
    if not cell.result.exists():
        with locked(cell.place, console, wait):
            if not cell.result.exists():
                run_cell(cell, weights, console)
    return dict(json.loads(cell.result.read_text(encoding="utf-8")))


def probed(cell: Cell, console: Console, wait: bool = True) -> list[Finding]:
    """Probe scores of every layer after the cell's own pre-training: read from disk, or computed first."""
    place = cell.place / "probe"
    if not (place / SCORES).exists():
        with locked(cell.place, console, wait):
            model = Path(pre_train(cell, {}, console).output)
            length = f"optimization.max_steps={cell.size.probe_steps}"
            probe_world(model, cell.world, cell.out / "bases", cell.size.judged, length, place)
    return read_findings(place)


def run_cell(cell: Cell, weights: Mapping[str, float], console: Console) -> None:
    """Trains and evaluates one cell, after the cells that it needs; finished stages are not repeated.

    Writes ``result.json`` with ``labels``: number of labels -> kind -> [right, asked]; ``cosines``: layer -> [centered
    cosine, the same with another scene's target]; ``cpu_seconds`` and ``steps`` by stage.
    """
    costs = {need.arm.name: finished(need, weights, console)["cpu_seconds"]["pt"] for need in needs(cell, weights)}
    pt, seconds = pre_train(cell, costs, console), Stopwatch(cell.place / "seconds.json")
    answered, cosines = {}, _cosines(pt, cell)
    for labels in cell.size.labels:
        ift = fine_tuning(cell, pt, labels)
        train_whole(ift, seconds, f"ift-{labels}", console)
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


def needs(cell: Cell, weights: Mapping[str, float]) -> list[Cell]:
    """The cells that must run first because this one needs their pre-trained model or its cost."""
    if cell.arm.name == NOTHING or (cell.arm.own_pt and not cell.arm.equal_compute):
        return []
    base = replace(cell, arm=ARMS[NOTHING], weight=None)
    published = replace(cell, arm=ARMS[PUBLISHED], weight=weights.get(PUBLISHED))
    return [base, published] if cell.arm.equal_compute else [base]


def pre_train(cell: Cell, costs: Mapping[str, float], console: Console) -> Run:
    """Runs ``pre_training`` unless its model is there. Results copied from another machine come without models."""
    prepare_world(cell, console)
    run = pre_training(cell, costs)
    place = Path(run.output).parent
    with nullcontext() if place == cell.place else locked(place, console, wait=True):
        train_whole(run, Stopwatch(place / "seconds.json"), "pt", console)
    return run


def pre_training(cell: Cell, costs: Mapping[str, float]) -> Run:
    """The recipe of a cell's pre-training. Arms that differ only in fine-tuning share that of the unsupervised arm.

    Args:
        costs: arm -> processor seconds of its pre-training; read by the arms of equal compute.
    """
    own = cell if cell.arm.own_pt else replace(cell, arm=ARMS[NOTHING], weight=None)
    arm, bases, steps = own.arm, cell.out / "bases", cell.size.pt_steps
    if arm.equal_compute:
        steps = round(steps * costs[PUBLISHED] / costs[NOTHING])
    changes: dict[str, Any] = {
        "seed": cell.seed,
        "output": str(own.place / "pt"),
        "start_from": str(cell.out / ("start_fed" if arm.fed else "start")),
        "data": rows_of(cell, "pretrain_more.json" if arm.more else "pretrain.json"),
        "optimization": {"max_steps": steps},
    }
    return load_run(arm.pt, changes=(_objective(arm.pt, bases, own.weight), changes))


def fine_tuning(cell: Cell, pt: Run, labels: int) -> Run:
    """The recipe of a cell's fine-tuning on a number of labels."""
    changes: dict[str, Any] = {
        "seed": cell.seed,
        "output": str(cell.place / f"ift-{labels}"),
        "start_from": str(pt.output),
        "data": rows_of(cell, f"instruct_{labels}.json"),
        "optimization": {"max_steps": cell.size.labels[labels]},
    }
    return load_run(cell.arm.ift, changes=(_objective(cell.arm.ift, cell.out / "bases", cell.weight), changes))


def rows_of(cell: Cell, name: str) -> dict[str, Any]:
    return {"sources": [{"json": str(cell.world / name), "images": str(cell.world / "images")}]}


def _objective(recipe: str, bases: Path, weight: float | None) -> dict[str, Any]:
    """Changes to a recipe: teachers from ``bases``, and the chosen weight for every task."""
    section = load_run(recipe).distillation
    if section is None:
        return {}
    tasks: dict[str, Any] = {name: {} if weight is None else {"weight": weight} for name in section.tasks}
    for name, task in section.taught.items():
        tasks[name]["target"] = {"model": str(bases / Path(task.target.place).name)}
    return {"distillation": {"tasks": tasks}}


def train_whole(run: Run, seconds: Stopwatch, part: str, console: Console) -> None:
    """Trains a stage from its first step unless it is finished and its time is known.

    An interrupted one is not resumed: arms of equal compute need the processor seconds of all steps, and a stage takes
    minutes. A process may also have been killed after it finished the stage, before it wrote the seconds.
    """
    if is_finished(run) and part in seconds.finished:
        return
    shutil.rmtree(run.output, ignore_errors=True)
    announce(console, "train", str(run.output))
    with seconds(part, resumes=False):
        run_stage(run, followed=True)


def _ask(cell: Cell, model: Path) -> dict[str, list[int]]:
    """Kind -> [right, asked] of a fine-tuned model. Writes its raw answers, too."""
    questions = read_questions(cell.world / "questions.json")
    answered = evaluate(load_to_ask(model), questions, cell.world / "images", batch_size=64, max_new_tokens=4)
    save_answers(cell.place / f"{model.name}.jsonl", answered)
    kinds = {
        kind: [row.correct for row in answered if row.kind == kind] for kind in dict.fromkeys(q.kind for q in questions)
    }
    return {kind: [sum(rows), len(rows)] for kind, rows in kinds.items()}


def _cosines(run: Run, cell: Cell) -> dict[str, list[float]]:
    """Layer -> [centered cosine of predictions and targets, the same with another scene's target].

    Empty where no head predicts a teacher's tokens.
    """
    taught = run.distillation.taught if run.distillation is not None else {}
    if not taught or any(task.head.kind == "none" for task in taught.values()):
        return {}
    found = world_findings(load_pre_trained(run.output), cell.world, cell.size.judged)
    return {f.name: [f.value, *f.controls.values()] for f in found if f.measure.startswith("cosine")}


def prepare_world(cell: Cell, console: Console) -> None:
    size = cell.size
    with locked(cell.world.parent, console, wait=True):
        if cell.world.exists():
            return
        announce(console, "world", f"{size.more} training scenes and {size.held_out} held-out scenes into {cell.world}")
        write_study_world(cell.world, cell.seed, size)
