"""The study's report: accuracies, paired differences, labels needed for equal accuracy, and learning curves."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from visper.common.console import Console
from visper.common.files import atomic_path, write_text
from visper.evaluation.intervals import paired
from visper.evaluation.probe.curves import draw_curves, require_drawable
from visper.evaluation.probe.measures import Finding
from visper.study.arms import NOTHING, SHUFFLED
from visper.study.run import mean_accuracy

Results = Mapping[str, Mapping[int, Mapping[str, Any]]]
"""Arm -> seed -> the result that ``run_cell`` writes."""
MEAN = "mean"


@dataclass(frozen=True)
class Difference:
    """An arm's accuracy minus the baseline's in percentage points, paired by seed, with its 95 % t-interval."""

    arm: str
    kind: str
    mean: float
    low: float
    high: float


def accuracies(results: Results, arm: str, labels: int) -> dict[int, dict[str, float]]:
    """Seed -> kind -> accuracy, with ``MEAN`` over the kinds seen in training."""
    found = {}
    for seed, result in results[arm].items():
        kinds = {kind: right / asked for kind, (right, asked) in result["labels"][str(labels)].items()}
        found[seed] = {**kinds, MEAN: mean_accuracy(result["labels"][str(labels)])}
    return found


def compare(results: Results, labels: int, baseline: str = NOTHING) -> list[Difference]:
    """Every arm against the baseline, paired by seed; arms that share fewer than two seeds with it are left out."""
    base, found = accuracies(results, baseline, labels), []
    for arm in results:
        own = accuracies(results, arm, labels)
        seeds = sorted(base.keys() & own.keys())
        if arm == baseline or len(seeds) < 2:
            continue
        for kind in own[seeds[0]]:
            points = ([100 * rows[seed][kind] for seed in seeds] for rows in (own, base))
            mean, (low, high) = paired(*points)
            found.append(Difference(arm, kind, mean, low, high))
    return found


def labels_needed(curve: Mapping[int, float], accuracy: float) -> float:
    """Labels at which a learning curve first reaches an accuracy, interpolated on a logarithmic scale.

    Args:
        curve: number of labels -> accuracy.

    Returns:
        The smallest measured number if it is enough; infinity if no measured number is.
    """
    points = sorted(curve.items())
    if points[0][1] >= accuracy:
        return float(points[0][0])
    for (few, low), (many, high) in itertools.pairwise(points):
        if high >= accuracy:
            share = (accuracy - low) / (high - low)
            return few * (many / few) ** share
    return math.inf


def labels_in_words(needed: float, labels: Sequence[int]) -> str:
    """Labels needed, as a bound at either end of the measured numbers."""
    if needed <= min(labels):
        return f"<= {min(labels)}"
    return f"{needed:.0f}" if math.isfinite(needed) else f"> {max(labels)}"


def report(
    results: Results, probes: Mapping[str, Sequence[Finding]], labels: Sequence[int], out: Path, console: Console
) -> None:
    """Writes ``out/report.json``, draws ``out/curves.svg`` and ``out/probes.svg``, then prints the tables.

    Args:
        probes: arm -> probe scores of every layer after pre-training.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    baselines = [arm for arm in (NOTHING, SHUFFLED) if arm in results]
    rows = {number: {base: compare(results, number, base) for base in baselines} for number in labels}
    most = max(labels)
    needed = {
        arm: {kind: labels_needed(curve, base) for kind, (curve, base) in _curves(results, arm, labels, most).items()}
        for arm in results
    }
    content = {
        "accuracies": {arm: {n: accuracies(results, arm, n) for n in labels} for arm in results},
        "differences": {n: {base: [vars(row) for row in found] for base, found in rows[n].items()} for n in labels},
        "labels_needed": {
            arm: {k: v if math.isfinite(v) else None for k, v in kinds.items()} for arm, kinds in needed.items()
        },
        "cosines": {arm: {seed: row["cosines"] for seed, row in seeds.items()} for arm, seeds in results.items()},
        "probes": {arm: [asdict(finding) for finding in found] for arm, found in probes.items()},
    }
    write_text(out / "report.json", json.dumps(content, indent=1))  # first: printing fails in `| head`
    draw(results, labels, out / "curves.svg")
    draw_curves(probes, out / "probes.svg")
    for number in labels:
        console.print(_accuracy_table(results, number))
        for base in (base for base in baselines if rows[number][base]):  # intervals need two seeds
            console.print(_difference_table(rows[number][base], base, number))
    table = Table("arm", *next(iter(needed.values())), title=f"labels needed for the accuracy of '{NOTHING}' at {most}")
    for arm, kinds in needed.items():
        table.add_row(arm, *(labels_in_words(value, labels) for value in kinds.values()))
    console.print(table)


def draw(results: Results, labels: Sequence[int], file: Path) -> None:
    """One panel per kind of question: accuracy over the number of labels, one line per arm, means over seeds.

    All panels show 0 to 1: an axis fitted to each panel would make half a point look large.
    """
    require_drawable(file)
    from matplotlib.figure import Figure

    kinds = list(next(iter(accuracies(results, NOTHING, labels[0]).values())))
    figure = Figure(figsize=(12, 7), layout="constrained")
    for axis, kind in zip(figure.subplots(2, 3, squeeze=False).flatten(), kinds, strict=False):
        for arm in results:
            means = [_means(accuracies(results, arm, number))[kind] for number in labels]
            axis.plot(labels, means, marker="o", label=arm)
        axis.set(title=kind, xlabel="labels", ylabel="accuracy", xscale="log", ylim=(-0.02, 1.02))
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4)
    with atomic_path(file) as partial:
        figure.savefig(partial, format="svg")


def _curves(results: Results, arm: str, labels: Sequence[int], most: int) -> dict[str, tuple[dict[int, float], float]]:
    """Kind -> (an arm's mean accuracy by number of labels, the unsupervised arm's with the most labels)."""
    base = _means(accuracies(results, NOTHING, most))
    own = {number: _means(accuracies(results, arm, number)) for number in labels}
    return {kind: ({number: own[number][kind] for number in labels}, base[kind]) for kind in base}


def _means(rows: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    kinds = next(iter(rows.values()))
    return {kind: statistics.fmean(row[kind] for row in rows.values()) for kind in kinds}


def _accuracy_table(results: Results, labels: int) -> Table:
    kinds = next(iter(accuracies(results, NOTHING, labels).values()))
    table = Table("arm", "seeds", *kinds, title=f"{labels} labels: mean accuracy over seeds (lowest)")
    for arm in results:
        rows = list(accuracies(results, arm, labels).values())
        cells = [[row[kind] for row in rows] for kind in kinds]
        table.add_row(arm, str(len(rows)), *(f"{statistics.fmean(c):.1%} ({min(c):.1%})" for c in cells))
    return table


def _difference_table(rows: Sequence[Difference], baseline: str, labels: int) -> Table:
    kinds = list(dict.fromkeys(row.kind for row in rows))
    table = Table("arm", *kinds, title=f"{labels} labels: points above '{baseline}', 95 % interval over seeds")
    for arm in dict.fromkeys(row.arm for row in rows):
        mine = {row.kind: row for row in rows if row.arm == arm}
        table.add_row(arm, *(f"{d.mean:+.1f} ({d.low:+.1f} to {d.high:+.1f})" for d in mine.values()))
    return table
