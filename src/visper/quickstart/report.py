"""The quickstart's HTML report: scores, what the layers predict during PT, loss curves, sample answers.

This file collects the content of the template ``report.html.jinja``. The page has no scripts and loads nothing.
"""

from __future__ import annotations

import base64
import io
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from visper.common.files import atomic_path, write_text
from visper.evaluation import Answered
from visper.evaluation.contact_sheet import contact_sheet, images_of
from visper.evaluation.predictions import layer_of, predicts_target, task_of, teacher_targets
from visper.quickstart.controls import HeldOut
from visper.quickstart.monitor import read_predictions
from visper.quickstart.objective import drawing_teachers
from visper.quickstart.run import Budget, Result, read_log

SHOWN = 5
"""Number of scenes drawn in the report."""
NOT_DRAWN = {"step", "epoch", "learning_rate", "grad_norm"}
"""Logged values without a curve."""

Grid = tuple[list[str], list[list[Image.Image]]]
"""Captions of the columns, and rows of images."""


@dataclass(frozen=True)
class Cell:
    """A table cell: its text and CSS classes."""

    text: str
    classes: str = ""


@dataclass(frozen=True)
class Curve:
    """One logged value as an SVG line, without smoothing."""

    name: str
    range: str
    path: str
    width: int = 240
    height: int = 96


def write_report(result: Result, budget: Budget) -> Path:
    """Writes ``report.html`` and ``predictions.png`` (only the grid of images) and returns the page's path."""
    out = result.out
    grids = prediction_grids(result, budget)
    if grids:  # the image in the README: the last layer of each task, at the end of the supervised stage
        with atomic_path(out / "predictions.png") as partial:
            overview(grids).save(partial, "PNG", optimize=True)
    page = render(
        seed=result.seed,
        scores=scores_table(result),
        predictions=[(header, [[data_uri(image) for image in row] for row in rows]) for header, rows in grids.values()],
        findings=findings_table(result),
        losses=[(stage.upper(), curves(read_log(out / stage))) for stage in result.runs],
        answers=sample_answers(result),
        run=run_lines(result),
    )
    write_text(out / "report.html", page)
    return out / "report.html"


def render(**content: Any) -> str:
    """Renders the page. Texts are escaped; a missing value is an error, never a blank."""
    environment = Environment(
        loader=PackageLoader("visper.quickstart", "."), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template("report.html.jinja").render(**content)


def prediction_grids(result: Result, budget: Budget) -> dict[str, Grid]:
    """For each tapped layer of tasks with a teacher: image, teacher's output and predictions at monitored steps."""
    if result.supervised is None:
        return {}
    teachers = drawing_teachers(result.runs[result.supervised])
    _, judged = HeldOut.halves(result.world, budget.judged)
    chosen = [len(judged.images) * i // SHOWN for i in range(SHOWN)]
    images = [judged.images[i] for i in chosen]
    monitored = read_predictions(result.out / "monitored")
    grids: dict[str, Grid] = {}
    for name in next(iter(monitored.values())):
        task = task_of(name)
        teacher = teachers.get(task)
        if teacher is None or not predicts_target(next(iter(monitored.values()))[name], teacher):
            continue
        columns = [images, images_of(teacher.decode(teacher_targets(teacher, images)))]
        columns += [images_of(teacher.decode(values[name][chosen])) for values in monitored.values()]
        header = ["image", f"{task} teacher", *(f"layer {layer_of(name)}, step {step}" for step in monitored)]
        grids[name] = (header, [list(row) for row in zip(*columns, strict=True)])
    return grids


def overview(grids: Mapping[str, Grid]) -> Image.Image:
    """One image: the input, then each task's teacher beside the last step of its last layer."""
    last: dict[str, Grid] = {task_of(name): grid for name, grid in grids.items()}
    header, rows = ["image"], [[row[0]] for row in next(iter(last.values()))[1]]
    for task, (names, shown_rows) in last.items():
        header += [f"{task}: teacher", f"{task}: {names[-1].split(',')[0]}"]
        for row, shown in zip(rows, shown_rows, strict=True):
            row += [shown[1], shown[-1]]
    captioned = [list(zip(header if r == 0 else [""] * len(header), row, strict=True)) for r, row in enumerate(rows)]
    return contact_sheet(captioned)


def scores_table(result: Result) -> dict[str, Any]:
    """Accuracy by kind beside the blind model, the untrained model, chance, and the cheap cues."""
    rows = []
    for row, blind, before, chance, cues in result.compared():
        (low, high), (blind_low, blind_high) = row.interval, blind.interval
        rows.append(
            [
                Cell(row.kind),
                Cell(f"{row.accuracy:.1%} ({low:.1%} to {high:.1%})", "number " + _mark(low > blind_high)),
                Cell(f"{blind.accuracy:.1%} ({blind_low:.1%} to {blind_high:.1%})", "number"),
                Cell(f"{before.accuracy:.1%}", "number"),
                Cell(chance, "number"),
                Cell(", ".join(f"{name} {value:.0%}" for name, value in cues.items())),
            ]
        )
    header = ["kind", "trained", "blind: another image", "before training", "chance", "each cheap cue alone"]
    return {"header": header, "rows": rows}


def findings_table(result: Result) -> dict[str, Any]:
    """Every measure of every tapped layer; green if it beats all of its controls."""
    rows = [
        [
            Cell(finding.name),
            Cell(finding.measure),
            Cell(f"{finding.value:.3f}", "number " + _mark(finding.beats_controls)),
            Cell("higher" if finding.higher else "lower"),
            Cell(finding.controls_text),
        ]
        for finding in result.findings
    ]
    return {"header": ["layer", "measure", "prediction", "better", "controls"], "rows": rows}


def sample_answers(result: Result) -> list[dict[str, Any]]:
    """A few questions of every kind with the model's answers, not selected by correctness."""
    by_kind: dict[str, list[Answered]] = {}
    for row in result.answered:
        by_kind.setdefault(row.kind, []).append(row)
    chosen = [row for rows in by_kind.values() for row in rows[:: max(1, len(rows) // 3)][:3]]
    found = []
    for row in chosen:
        with Image.open(result.world / "images" / row.images[0]) as file:
            uri = data_uri(file.convert("RGB"))
        verdict = "right" if row.correct else f"wrong, it is {' or '.join(row.expected)}"
        found.append({"uri": uri, "kind": row.kind, "question": row.question, "said": row.said, "verdict": verdict})
    return found


def run_lines(result: Result) -> tuple[str, ...]:
    """Steps, seconds, machine and versions."""
    seconds = ", ".join(f"{part} {taken:.0f} s" for part, taken in result.seconds.items())
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    steps = ", ".join(f"{stage} {run.optimization.max_steps} steps" for stage, run in result.runs.items())
    return (steps, seconds, f"{torch.get_num_threads()} threads on {platform.machine()}; {versions}")


def curves(logs: Sequence[Mapping[str, float]]) -> list[Curve]:
    """The curves of all logged values that have more than one point."""
    names = sorted({name for entry in logs for name in entry} - NOT_DRAWN)
    points = {name: [(entry["step"], entry[name]) for entry in logs if name in entry] for name in names}
    return [_curve(name, own) for name, own in points.items() if len(own) > 1]


def _curve(name: str, points: Sequence[tuple[float, float]]) -> Curve:
    xs, ys = [x for x, _ in points], [y for _, y in points]
    across, up = (max(xs) - min(xs)) or 1.0, (max(ys) - min(ys)) or 1.0
    width, height, margin = Curve.width, Curve.height, 4
    path = " ".join(
        f"{margin + (x - min(xs)) / across * (width - 2 * margin):.1f},"
        f"{height - margin - (y - min(ys)) / up * (height - 2 * margin):.1f}"
        for x, y in points
    )
    return Curve(name, f"{ys[0]:.3g} to {ys[-1]:.3g} in {max(xs):g} steps", path)


def data_uri(image: Image.Image, scale: int = 2) -> str:
    """An enlarged image as a ``data:`` URI, so that the page is a single file."""
    enlarged = image.convert("RGB").resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    enlarged.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _mark(good: bool) -> str:
    return "good" if good else "bad"
