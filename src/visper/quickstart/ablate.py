"""Does distillation help here? The same budget with and without the embedding losses, over seeds.

Arms: the recipe; another loss weight (the published 0.5); no embedding losses (task tokens kept) at equal steps; and
the same at equal compute, since a step with losses costs more. Differences are paired by seed: an arm and its baseline
share world, projector and row order.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from visper.common.console import Console
from visper.quickstart.run import FULL, TASKS, TRAINED, Budget, quickstart, stage_runs

BASELINE = "no losses"
RECIPE = "weight 0.1"
EQUAL_COMPUTE = "no losses, equal compute"

ARMS: dict[str, dict[str, Any]] = {
    BASELINE: {"distillation": None},
    RECIPE: {},
    "weight 0.5": {"distillation": {"tasks": {task: {"weight": 0.5} for task in TASKS}}},
    EQUAL_COMPUTE: {"distillation": None},
}
"""Arm -> what it changes in the pre-training recipe."""


@dataclass(frozen=True)
class Difference:
    """An arm's accuracy less the baseline's, in points, paired by seed, with its 95 % t-interval."""

    arm: str
    kind: str
    mean: float
    low: float
    high: float


def ablate(out: Path, seeds: int, budget: Budget = FULL, console: Console | None = None) -> list[Difference]:
    """Runs every arm with every seed (finished ones are read, not run again) and reports the differences.

    Raises:
        ValueError: fewer than two seeds give no interval.
    """
    if seeds < 2:
        raise ValueError(f"--seeds {seeds}: an interval over seeds needs at least 2, a claim at least 5")
    console = console or Console()
    accuracies: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for seed in range(seeds):
        for arm in ARMS:
            accuracies[arm].append(run_arm(out, arm, seed, budget, console))
    found = [d for arm in ARMS if arm != BASELINE for d in differences(arm, accuracies[arm], accuracies[BASELINE])]
    show(accuracies, found, console)
    return found


def run_arm(out: Path, arm: str, seed: int, budget: Budget, console: Console) -> dict[str, float]:
    """Accuracy by kind of one arm with one seed."""
    place = out / f"seed-{seed}" / arm.replace(" ", "-").replace(",", "")
    finished = place / "result.json"
    if not finished.exists():
        if arm == EQUAL_COMPUTE:
            budget = replace(budget, pt_steps=equal_compute_steps(out, seed, budget))
        quickstart(place, seed, budget, console, out / f"seed-{seed}" / "world", ARMS[arm])
    table = json.loads(finished.read_text(encoding="utf-8"))["scores"][TRAINED]
    return {kind: row["correct"] / row["total"] for kind, row in table.items()}


def equal_compute_steps(out: Path, seed: int, budget: Budget) -> int:
    """Steps without losses that take the processor seconds of the recipe's steps with them, as measured with this
    seed. Processor seconds, because the clock's depend on what else the machine does."""
    taken = {}
    for arm in (BASELINE, RECIPE):
        folder = out / f"seed-{seed}" / arm.replace(" ", "-")
        taken[arm] = json.loads((folder / "result.json").read_text(encoding="utf-8"))["cpu_seconds"]["pt"]
    steps = stage_runs(out, out, seed, budget)["pt"].optimization.max_steps
    assert steps is not None
    return round(steps * taken[RECIPE] / taken[BASELINE])


def differences(
    arm: str, ours: Sequence[Mapping[str, float]], baseline: Sequence[Mapping[str, float]]
) -> list[Difference]:
    """Per kind the mean paired difference in points and its t-interval."""
    rows = []
    for kind in ours[0]:
        points = [100 * (a[kind] - b[kind]) for a, b in zip(ours, baseline, strict=True)]
        mean = statistics.fmean(points)
        spread = t_quantile(len(points) - 1) * statistics.stdev(points) / math.sqrt(len(points))
        rows.append(Difference(arm, kind, mean, mean - spread, mean + spread))
    return rows


def t_quantile(freedom: int) -> float:
    """Student's t at 97.5 %, which bounds a two-sided 95 % interval, for ``freedom`` degrees of freedom."""
    from scipy.stats import t  # a second to import: only this verb pays for it

    return float(t.ppf(0.975, freedom))


def show(
    accuracies: Mapping[str, Sequence[Mapping[str, float]]], found: Sequence[Difference], console: Console
) -> None:
    """Accuracy of every arm (the lowest seed shows whether each run learned), then differences from the baseline."""
    kinds = list(next(iter(accuracies.values()))[0])
    table = Table("arm", *kinds, title="accuracy: mean over seeds (lowest seed)")
    for arm, rows in accuracies.items():
        columns = [[row[kind] for row in rows] for kind in kinds]
        table.add_row(arm, *(f"{statistics.fmean(column):.1%} ({min(column):.1%})" for column in columns))
    console.print(table)
    table = Table("arm", *kinds, title=f"points more than '{BASELINE}', 95 % interval")
    for arm in accuracies:
        mine = {d.kind: d for d in found if d.arm == arm}
        if mine:
            table.add_row(arm, *(f"{d.mean:+.1f} ({d.low:+.1f} to {d.high:+.1f})" for d in map(mine.get, kinds) if d))
    console.print(table)
