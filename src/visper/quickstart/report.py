"""The quickstart's HTML report: scores, what the layers predict while PT runs, loss curves, sample answers."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from PIL import Image

from visper.common.files import atomic_path, write_text
from visper.distillation.teachers.tower import TowerTeacher
from visper.evaluation import Answered
from visper.evaluation.contact_sheet import contact_sheet, images_of
from visper.evaluation.predictions import teacher_targets
from visper.quickstart import page
from visper.quickstart.controls import HeldOut
from visper.quickstart.monitor import read_predictions
from visper.quickstart.questions import CHANCE
from visper.quickstart.run import BLIND, TRAINED, UNTRAINED, Budget, Result

SHOWN = 5
"""Scenes drawn in the report."""


def write_report(result: Result, budget: Budget) -> Path:
    """Writes ``report.html`` and ``predictions.png`` (the grid of pictures alone) and returns the page's path."""
    out = result.out
    sheets = prediction_sheets(result, budget)
    # The README's picture: the last layer of each task, at the end of PT.
    with atomic_path(out / "predictions.png") as partial:
        overview(sheets).save(partial, "PNG", optimize=True)
    sections = [
        ("Questions about pictures it never saw", scores_section(result)),
        ("What the LLM's layers predict while PT runs", "".join(page.sheet(*sheet) for sheet in sheets.values())),
        ("The predictions, beside their controls", findings_section(result)),
        ("Losses of PT", page.curves(read_log(out / "pt" / "log.jsonl"), skip=("learning_rate", "grad_norm"))),
        ("Losses of IFT", page.curves(read_log(out / "ift" / "log.jsonl"), skip=("learning_rate", "grad_norm"))),
        ("Answers", answers_section(result)),
        ("The run", run_section(result)),
    ]
    lead = f"A student pre-trained with embedding distillation and fine-tuned on rendered scenes; seed {result.seed}."
    write_text(out / "report.html", page.page("VisPer quickstart", lead, sections))
    return out / "report.html"


Sheet = tuple[list[str], list[list[Image.Image]]]


def prediction_sheets(result: Result, budget: Budget) -> dict[str, Sheet]:
    """Per tapped layer a grid: picture, teacher, and the prediction at each watched step."""
    held_out = HeldOut.read(result.world, 2 * budget.judged)
    judged = held_out.part(budget.judged, 2 * budget.judged)
    chosen = [len(judged.pictures) * i // SHOWN for i in range(SHOWN)]
    pictures = [judged.pictures[i] for i in chosen]
    watched = read_predictions(result.out / "watched")
    sheets: dict[str, Sheet] = {}
    for name in next(iter(watched.values())):
        task = name.split("/")[0]
        teacher = TowerTeacher(result.out / "bases" / f"teacher_{task}")
        columns = [pictures, images_of(teacher.decode(teacher_targets(teacher, pictures)))]
        columns += [images_of(teacher.decode(values[name][chosen])) for values in watched.values()]
        header = ["picture", f"{task} teacher", *(f"layer {name.split('/')[1]}, step {step}" for step in watched)]
        sheets[name] = (header, [list(row) for row in zip(*columns, strict=True)])
    return sheets


def overview(sheets: dict[str, Sheet]) -> Image.Image:
    """One picture: input, then each task's teacher beside the last step of its last layer."""
    last: dict[str, Sheet] = {name.split("/")[0]: sheet for name, sheet in sheets.items()}
    header, rows = ["picture"], [[row[0]] for row in next(iter(last.values()))[1]]
    for task, (names, pictures) in last.items():
        header += [f"{task}: teacher", f"{task}: {names[-1].split(',')[0]}"]
        for row, shown in zip(rows, pictures, strict=True):
            row += [shown[1], shown[-1]]
    captioned = [list(zip(header if r == 0 else [""] * len(header), row, strict=True)) for r, row in enumerate(rows)]
    return contact_sheet(captioned)


def scores_section(result: Result) -> str:
    """Accuracy by kind beside the blind model, the untrained one, chance, and the best cheap cue."""
    blind = {row.kind: row for row in result.scores[BLIND]}
    before = {row.kind: row for row in result.scores[UNTRAINED]}
    rows, flags = [], {}
    for index, row in enumerate(result.scores[TRAINED]):
        low, high = row.interval
        flags[(index, 1)] = "good" if low > blind[row.kind].interval[1] else "bad"
        cues = ", ".join(f"{name} {value:.0%}" for name, value in result.cues.get(row.kind, {}).items())
        chance = f"{CHANCE[row.kind]:.0%}" if row.kind in CHANCE else ""
        blind_low, blind_high = blind[row.kind].interval
        rows.append(
            [
                row.kind,
                f"{row.accuracy:.1%} ({low:.1%} to {high:.1%})",
                f"{blind[row.kind].accuracy:.1%} ({blind_low:.1%} to {blind_high:.1%})",
                f"{before[row.kind].accuracy:.1%}",
                chance,
                cues,
            ]
        )
    header = [
        "kind",
        "trained",
        "blind: another's picture",
        "before training",
        "chance",
        "what a cheap cue alone scores",
    ]
    explained = (
        "Share of right answers with Wilson's 95 % intervals. The blind column is the same trained model shown another "
        "question's picture. Green: the intervals are apart. A cheap cue answers from one number, such as the image "
        "row or the apparent size; the questions are drawn so that none gets far."
    )
    return page.table(header, rows, flags) + page.note(explained)


def findings_section(result: Result) -> str:
    """Every measure of every tapped layer; green where it beats all of its controls."""
    rows, flags = [], {}
    for index, finding in enumerate(result.findings):
        controls = ", ".join(f"{name} {value:.3f}" for name, value in finding.controls.items())
        flags[(index, 2)] = "good" if finding.beats_controls else "bad"
        better = "higher" if finding.higher else "lower"
        rows.append([finding.name, finding.measure, f"{finding.value:.3f}", better, controls])
    explained = (
        "On held-out scenes, after PT, from a fixed prompt without an answer. The teacher is the ceiling; every other "
        "control must be beaten for a layer to be said to see. Without taking the mean target away a cosine of 0.9 "
        "means nothing: all scenes share a layout."
    )
    return page.table(["layer", "measure", "prediction", "better", "controls"], rows, flags) + page.note(explained)


def answers_section(result: Result) -> str:
    """A few questions of every kind with the answers given, right and wrong as they come."""
    by_kind: dict[str, list[Answered]] = {}
    for row in result.answered:
        by_kind.setdefault(row.kind, []).append(row)
    blocks = []
    for kind, rows in by_kind.items():
        chosen = rows[:: max(1, len(rows) // 3)][:3]
        for row in chosen:
            with Image.open(result.world / "images" / str(row.image)) as file:
                shown = page.picture(file.convert("RGB"))
            mark = "right" if row.correct else f"wrong, it is {row.expected}"
            text = page.note(f"{kind}: {row.question}") + page.note(f"answer: {row.said} ({mark})")
            blocks.append(f"<div>{shown}{text}</div>")
    return f"<div class='sheet' style='grid-template-columns:repeat(3,1fr)'>{''.join(blocks)}</div>"


def run_section(result: Result) -> str:
    """Command, machine, versions, seconds."""
    seconds = ", ".join(f"{part} {taken:.0f} s" for part, taken in result.seconds.items())
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    steps = ", ".join(f"{stage} {run.optimization.max_steps} steps" for stage, run in result.runs.items())
    lines = (steps, seconds, f"{torch.get_num_threads()} threads on {platform.machine()}; {versions}")
    return "".join(page.note(line) for line in lines)


def read_log(path: Path) -> Sequence[dict[str, float]]:
    """The entries of a stage's log that hold a loss."""
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [entry for entry in entries if "loss" in entry]
