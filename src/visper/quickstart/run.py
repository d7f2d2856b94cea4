"""The quickstart, on two cores: a rendered world, PT with embedding losses, IFT, questions, images.

It runs the code of a real run, two recipes through ``run_stage``; only the bases and the data are small.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from visper.common.console import Console, announce
from visper.common.errors import ConfigError, TrainingError
from visper.common.files import write_text
from visper.common.lock import new_folder
from visper.config import Run, Stage, load_run
from visper.evaluation import Answered, Score, evaluate, read_questions, save_answers, scores
from visper.evaluation.probe.curves import findings_table
from visper.evaluation.probe.measures import Finding
from visper.model import load_student
from visper.model.start import starting_student
from visper.quickstart import BASES
from visper.quickstart.controls import HeldOut, findings
from visper.quickstart.monitor import PredictionMonitor, read_predictions
from visper.quickstart.objective import drawing_teachers, scaled_objective, sources_of
from visper.quickstart.questions import CHANCE
from visper.quickstart.world import write_world
from visper.training import is_finished, run_stage

TASKS = ("depth", "seg", "gen")
BLIND, UNTRAINED, TRAINED = "blind", "untrained", "trained"


@dataclass(frozen=True)
class Budget:
    """The sizes of a quickstart. ``judged`` held-out scenes measure predictions; as many others give the controls."""

    scenes: int
    held_out: int
    per_kind: int
    pt_steps: int | None  # None: the recipe's own number
    ift_steps: int | None
    judged: int


FULL = Budget(scenes=4000, held_out=600, per_kind=400, pt_steps=None, ift_steps=None, judged=200)
FAST = Budget(scenes=200, held_out=80, per_kind=16, pt_steps=45, ift_steps=20, judged=40)


@dataclass(frozen=True)
class Result:
    """The results of a quickstart, and its folders."""

    out: Path
    world: Path
    seed: int
    runs: dict[str, Run]
    scores: dict[str, list[Score]]
    answered: list[Answered]
    findings: list[Finding]
    cues: dict[str, dict[str, float]]
    seconds: dict[str, float]
    cpu_seconds: dict[str, float]

    @property
    def supervised(self) -> str | None:
        """The stage with embedding losses."""
        return supervised_stage(self.runs)

    def compared(self) -> Iterator[tuple[Score, Score, Score, str, dict[str, float]]]:
        """By kind: the scores trained, blind and untrained, chance as text, and the accuracy of each cheap cue."""
        for rows in zip(*(self.scores[name] for name in (TRAINED, BLIND, UNTRAINED)), strict=True):
            kind = rows[0].kind
            yield *rows, f"{CHANCE[kind]:.0%}" if kind in CHANCE else "", self.cues.get(kind, {})


def quickstart(
    out: Path,
    seed: int = 0,
    budget: Budget = FULL,
    console: Console | None = None,
    objective: str | None = None,
) -> Result:
    """Makes the world, trains, and evaluates. Finished parts are kept, so it is safe to repeat and to interrupt.

    Args:
        out: the folder of all results: ``world/``, ``bases/``, ``pt/``, ``ift/``.
        seed: seed of the world, the projector and the order of the rows.
        objective: a recipe whose embedding losses, scaled to this student, replace the quickstart's own.

    Raises:
        ConfigError: ``objective`` has no losses for the quickstart's stages, or the world has another seed or size.
    """
    console = console or Console()
    if objective is not None:
        _, section, _ = scaled_objective(objective, BASES)  # refuses other recipes before the world is rendered
        places = {name: task["target"]["model"] for name, task in section["tasks"].items()}
        replaced = [f"{Path(place).name} for '{name}'" for name, place in places.items() if place is not None]
        if replaced:
            announce(console, "teachers", f"not the recipe's, but the quickstart's own: {', '.join(replaced)}")
    seconds = Stopwatch(out / "seconds.json")
    with seconds("world"):
        world = prepare_world(out / "world", seed, budget, console)
        copy_bases(out / "bases")
    runs = stage_runs(out, world, seed, budget, objective=objective)
    supervised = supervised_stage(runs)
    fit, judged = HeldOut.halves(world, budget.judged)
    steps = monitored_steps(runs[supervised or "pt"])
    for stage, run in runs.items():
        if is_finished(run):
            announce(console, "finished", f"{run.name}: {run.output}")
            continue
        with seconds(stage):
            monitor = PredictionMonitor(out / "monitored", judged.images, steps)
            run_stage(run, resume=True, callbacks=[monitor] if stage == supervised else [], followed=True)
    with seconds("questions"):
        answered = ask_everything(out, runs, world)
    found: list[Finding] = []
    if supervised is not None:
        with seconds("predictions"):
            run = runs[supervised]
            teachers = drawing_teachers(run)
            sources = sources_of(run, load_student(run.output), teachers)
            found = findings(read_predictions(out / "monitored")[steps[-1]], sources, teachers, fit, judged)
    table = {name: scores(rows) for name, rows in answered.items()}
    cues = json.loads((world / "world.json").read_text(encoding="utf-8"))["cheap_cues"]
    result = Result(out, world, seed, runs, table, answered[TRAINED], found, cues, seconds.wall, seconds.cpu)
    save_result(result)
    show_result(result, console)
    return result


def prepare_world(world: Path, seed: int, budget: Budget, console: Console) -> Path:
    """Renders the world, unless it exists.

    Raises:
        ConfigError: the existing world has another seed or size.
    """
    wanted = {"seed": seed, "scenes": budget.scenes, "held_out": budget.held_out, "per_kind": budget.per_kind}
    if world.exists():
        there = json.loads((world / "world.json").read_text(encoding="utf-8"))
        if any(there[key] != value for key, value in wanted.items()):
            raise ConfigError(f"'{world}' holds a world of another seed or size: choose another --out, or remove it")
        announce(console, "finished", f"world: {world}")
        return world
    world.parent.mkdir(parents=True, exist_ok=True)
    announce(console, "world", f"{budget.scenes} training scenes and {budget.held_out} held-out ones, into {world}")
    write_world(world, **wanted)
    return world


def copy_bases(folder: Path) -> None:
    """Copies the shipped bases to where the recipes expect them, as ordinary model folders that users can inspect."""
    if not folder.exists():
        with new_folder(folder) as partial:
            partial.mkdir()
            for source in sorted(BASES.rglob("*")):  # unlike copytree, whose error lists every file, stops at the first
                place = partial / source.relative_to(BASES)
                if source.is_dir():
                    place.mkdir()
                else:
                    shutil.copyfile(source, place)


def stage_runs(
    out: Path,
    world: Path,
    seed: int,
    budget: Budget,
    pt_changes: Mapping[str, Any] | None = None,
    objective: str | None = None,
) -> dict[str, Run]:
    """The two recipes, with their paths under ``out``. ``objective``: see ``quickstart``."""
    bases = out / "bases"
    tasks = {task: {"target": {"model": str(bases / f"teacher_{task}")}} for task in TASKS}
    pt: dict[str, Any] = {
        "seed": seed,
        "output": str(out / "pt"),
        "student": {"llm": str(bases / "llm"), "encoder": str(bases / "encoder")},
        "data": {"sources": [{"json": str(world / "pretrain.json"), "images": str(world / "images")}]},
        "distillation": {"tasks": tasks},
    }
    ift: dict[str, Any] = {
        "seed": seed,
        "output": str(out / "ift"),
        "start_from": str(out / "pt"),
        "data": {"sources": [{"json": str(world / "instruct.json"), "images": str(world / "images")}]},
    }
    for changes, steps in ((pt, budget.pt_steps), (ift, budget.ift_steps)):
        if steps:
            changes["optimization"] = {"max_steps": steps}
    if objective is not None:
        stage, section, task_tokens = scaled_objective(objective, bases)
        pt["distillation"] = section if stage is Stage.PT else None
        ift["distillation"] = section if stage is Stage.IFT else None
        pt["student"]["task_tokens"] = task_tokens
    own: dict[str, Any] = {} if objective is None else {"distillation": None, "student": {"task_tokens": None}}
    return {
        "pt": load_run("quickstart/pt", changes=(own, pt, pt_changes or {})),
        "ift": load_run("quickstart/ift", changes=(ift,)),
    }


def supervised_stage(runs: Mapping[str, Run]) -> str | None:
    """The stage that has embedding losses."""
    return next((stage for stage, run in runs.items() if run.distillation is not None), None)


def monitored_steps(run: Run) -> list[int]:
    """The steps at which predictions are saved: before the first, and after an eighth, half and all of them."""
    total = run.optimization.max_steps
    assert total is not None
    return sorted({0, max(1, total // 8), total // 2, total})


def ask_everything(out: Path, runs: Mapping[str, Run], world: Path) -> dict[str, list[Answered]]:
    """Answers of the trained model, of the same model shown other images, and of the untrained one; all are saved."""
    questions = read_questions(world / "questions.json")
    images = world / "images"
    trained = load_student(out / "ift")
    torch.manual_seed(runs["pt"].seed)  # gives the projector that PT began with
    untrained = starting_student(runs["pt"])
    asked = ((TRAINED, trained, False), (BLIND, trained, True), (UNTRAINED, untrained, False))
    answered = {
        name: evaluate(student, questions, images, batch_size=64, max_new_tokens=4, shuffle_images=shuffled)
        for name, student, shuffled in asked
    }
    for name, rows in answered.items():
        save_answers(out / "answers" / f"{name}.jsonl", rows)
    return answered


def read_log(folder: Path) -> list[dict[str, float]]:
    """The entries of a stage's log that have a loss."""
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry for entry in map(json.loads, lines) if "loss" in entry]


def check_learning(result: Result) -> None:
    """Checks that every loss term of each stage fell.

    Raises:
        TrainingError: some terms are not lower in the last third of the log than in the first; it names them.
    """
    stuck = []
    for stage in result.runs:
        logs = read_log(result.out / stage)
        terms = [name for name in logs[0] if name == "ntp" or name.count("/") == 2]
        third = max(1, len(logs) // 3)  # single batches are noisy

        def mean(name: str, entries: list[dict[str, float]]) -> float:
            return sum(entry[name] for entry in entries) / len(entries)

        stuck += [f"{stage}: {name}" for name in terms if not mean(name, logs[-third:]) < mean(name, logs[:third])]
    if stuck:
        raise TrainingError(f"these losses did not fall, so nothing was learned from them: {', '.join(stuck)}")


def save_result(result: Result) -> None:
    """Writes all figures of the run to ``result.json``."""
    rows = {
        "seed": result.seed,
        "scores": {
            name: {row.kind: {"correct": row.correct, "total": row.total, "interval": row.interval} for row in table}
            for name, table in result.scores.items()
        },
        "chance": CHANCE,
        "cheap_cues": result.cues,
        "predictions": [
            {"layer": f.name, "measure": f.measure, "value": f.value, "interval": f.interval, "controls": f.controls}
            for f in result.findings
        ],
        "seconds": result.seconds,
        "cpu_seconds": result.cpu_seconds,
    }
    write_text(result.out / "result.json", json.dumps(rows, indent=1))


def show_result(result: Result, console: Console) -> None:
    """Prints the table of accuracies, and the predictions beside their controls."""
    table = Table("kind", "trained", "95 % interval", "blind", "untrained", "chance", "best cheap cue")
    for row, blind, before, chance, cues in result.compared():
        low, high = row.interval
        best = max(cues, key=lambda cue: cues[cue], default=None)
        table.add_row(
            row.kind,
            f"{row.accuracy:.1%}",
            f"{low:.1%} to {high:.1%}",
            f"{blind.accuracy:.1%}",
            f"{before.accuracy:.1%}",
            chance,
            f"{best} {cues[best]:.1%}" if best else "",
        )
    console.print(table)
    console.print(findings_table(result.findings))


class Stopwatch:
    """Wall-clock and CPU seconds of each part, saved in ``file`` so that a repeated command still has those of finished
    parts, and adds to those of interrupted ones. A killed process saves nothing of its attempt."""

    def __init__(self, file: Path) -> None:
        self.file = file
        taken = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"wall": {}, "cpu": {}}
        self.wall: dict[str, float] = taken["wall"]
        self.cpu: dict[str, float] = taken["cpu"]
        self.finished: list[str] = taken.get("finished", list(self.wall))  # files once had finished parts only

    @contextmanager
    def __call__(self, part: str, resumes: bool = True) -> Iterator[None]:
        """Times an attempt at a part. Without ``resumes``, it begins anew, so earlier attempts do not count."""
        wall, cpu, finished = time.perf_counter(), _cpu_seconds(), False
        try:
            yield
            finished = True
        finally:
            if part not in self.finished:  # else it takes no time now, or was measured before
                for taken, used in ((self.wall, time.perf_counter() - wall), (self.cpu, _cpu_seconds() - cpu)):
                    taken[part] = used + (taken.get(part, 0.0) if resumes else 0.0)
                self.finished += [part] if finished else []
            write_text(self.file, json.dumps({"wall": self.wall, "cpu": self.cpu, "finished": self.finished}))


def _cpu_seconds() -> float:
    """CPU seconds of this process and of its loader workers that have ended."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system
