"""Does distillation put depth and segmentation into layers that are not tapped? (The paper's central figure.)

    python benchmarks/probe_curves.py --out probe-curves --seeds 3

On the quickstart's offline world, for each seed: probes of the base model (with the projector's initial weights), of a
PT without embedding losses and of a PT with them, with the same seed, steps, rows and order of rows. Finished parts
are kept. Writes ``result.json`` (a paired difference for each layer, with its 95 % t-interval over seeds) and
``curves.svg``. Two epochs, as published, show how fast a probe learns to read a layer; ``--epochs 8``
(``result-8.json``) shows what the layer holds.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from visper.common.console import Console
from visper.common.files import atomic_path, write_text
from visper.config import Run
from visper.evaluation.intervals import paired
from visper.evaluation.probe.curves import averaged, draw_curves
from visper.evaluation.probe.measures import Finding
from visper.model import save_student
from visper.model.start import starting_student
from visper.quickstart.probed import probe_world
from visper.quickstart.run import FAST, FULL, Budget, copy_bases, prepare_world, stage_runs
from visper.training import is_finished, run_stage

BASE, WITHOUT, WITH = "base model", "PT without losses", "PT with losses"
ARMS: dict[str, dict[str, Any] | None] = {BASE: None, WITHOUT: {"distillation": None}, WITH: {}}
"""Arm -> its changes to the pre-training recipe; None: no training."""
EPOCHS = 2
"""As in the paper."""


def trained_arm(folder: Path, arm: str, world: Path, seed: int, budget: Budget) -> Path:
    """The output of an arm's pre-training."""
    place = folder / arm.replace(" ", "-")
    changes = ARMS[arm]
    run: Run = stage_runs(folder, world, seed, budget, {**(changes or {}), "output": str(place)})["pt"]
    if changes is None:
        if not (place / "model").exists():
            torch.manual_seed(seed)
            with atomic_path(place / "model") as partial:
                save_student(starting_student(run), partial)
    elif not is_finished(run):
        run_stage(run, resume=True)
    return place


def probed(place: Path, world: Path, budget: Budget, epochs: int = EPOCHS) -> list[Finding]:
    """The scores of an arm's probes on held-out scenes."""
    length = "optimization.max_steps=10" if budget is FAST else f"optimization.epochs={epochs}"
    return probe_world(place, world, place.parent / "bases", budget.judged, length, place / f"probe{suffix(epochs)}")


def suffix(epochs: int) -> str:
    """Suffix of the files that belong to probes of this length."""
    return "" if epochs == EPOCHS else f"-{epochs}"


def differences(arm: list[list[Finding]], other: list[list[Finding]]) -> list[dict[str, Any]]:
    """The paired difference of every layer and measure, with its interval if there are at least two seeds."""
    rows = []
    for ours, theirs in zip(zip(*arm, strict=True), zip(*other, strict=True), strict=True):
        both = [a.value for a in ours], [b.value for b in theirs]
        points = [a - b for a, b in zip(*both, strict=True)]
        row: dict[str, Any] = {"layer": ours[0].name, "measure": ours[0].measure, "higher": ours[0].higher}
        row |= {"difference": statistics.fmean(points), "of_each_seed": points}
        if len(points) > 1:
            row["interval"] = list(paired(*both)[1])
        rows.append(row)
    return rows


def main() -> None:
    """Runs the missing parts, then writes the result over all finished seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="epochs of the probes' training")
    parser.add_argument("--fast", action="store_true", help="only check that everything runs")
    options = parser.parse_args()
    budget = FAST if options.fast else FULL
    torch.set_num_threads(1)
    found: dict[str, list[list[Finding]]] = {arm: [] for arm in ARMS}
    for seed in range(options.seeds):
        folder = options.out / f"seed-{seed}"
        world = prepare_world(folder / "world", seed, budget, Console())
        copy_bases(folder / "bases")
        for arm in ARMS:
            found[arm].append(probed(trained_arm(folder, arm, world, seed, budget), world, budget, options.epochs))
        means = {arm: averaged(seeds) for arm, seeds in found.items()}
        result = {
            "command": " ".join(["python", *sys.argv]),
            "date": date.today().isoformat(),
            "machine": f"{platform.machine()} CPU, one thread, float32",
            "versions": {name: version(name) for name in ("torch", "transformers")},
            "seeds": seed + 1,
            "means": {arm: [vars(f) for f in own] for arm, own in means.items()},
            f"{WITH} less {WITHOUT}": differences(found[WITH], found[WITHOUT]),
            f"{WITHOUT} less {BASE}": differences(found[WITHOUT], found[BASE]),
        }
        write_text(options.out / f"result{suffix(options.epochs)}.json", json.dumps(result, indent=1) + "\n")
        draw_curves(means, options.out / f"curves{suffix(options.epochs)}.svg")


if __name__ == "__main__":
    main()
