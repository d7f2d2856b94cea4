"""Runs the study: per arm and seed one pre-training, and from it one fine-tuning for each number of labels."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from visper.common.console import Console
from visper.common.errors import ConfigError, TrainingError
from visper.common.files import write_text
from visper.common.lock import InUseError, locked, new_folder
from visper.config import load_run
from visper.evaluation.probe.curves import averaged
from visper.evaluation.probe.measures import Finding
from visper.quickstart.run import Stopwatch, copy_bases
from visper.quickstart.scenes import draw_scene
from visper.study.arms import ARMS, FEEDING, NOTHING, Arm, Size
from visper.study.cells import Cell, finished, needs, prepare_world, probed, rows_of, train_whole
from visper.study.controls import save_fed, save_tower
from visper.study.world import NEAREST
from visper.training import is_finished

Result = TypeVar("Result")
CHOOSING_SEED = 1000
"""The seed on which loss weights are chosen; it is not reported."""
START_SEED = 1001
"""The seed of the scenes on which the student that all arms start from is trained; used for nothing else."""
TOLD = ("teacher_depth", "teacher_seg")
"""The teachers whose tokens feature feeding adds to the input."""
WEIGHTS = (0.1, 0.5)
"""Loss weights tried for every arm with embedding losses; each applies to all tasks of the arm."""


def study(
    out: Path, seeds: Sequence[int], size: Size, console: Console, arms: Sequence[str] = tuple(ARMS)
) -> tuple[dict[str, dict[int, Any]], dict[str, list[Finding]]]:
    """Chooses weights, runs every arm with every seed, then probes. Finished parts are read from disk, not run again.

    Returns:
        The results of all cells, ``{arm: {seed: result}}`` (see ``run_cell``), and the scores of ``probe``.

    Raises:
        ConfigError: an unknown arm; the unsupervised arm is missing; ``out`` holds results of another size or recipe.
        TrainingError: the setting can show nothing, see ``require_upper_mark``.
    """
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise ConfigError(f"--arm {', '.join(unknown)}: expected some of {', '.join(ARMS)}")
    if NOTHING not in arms:
        raise ConfigError(f"--arm {', '.join(arms)}: every arm is compared with '{NOTHING}': add --arm {NOTHING}")
    _require_same(out, size)
    prepare_start(out, size, console)
    require_upper_mark(out, size, console)
    weights = choose_weights(out, size, [ARMS[name] for name in arms], console)
    cells = [Cell(out, ARMS[name], seed, size, weights.get(name)) for seed in seeds for name in arms]
    found = finish(cells, weights, console)
    results: dict[str, dict[int, Any]] = {name: {} for name in arms}
    for cell, result in zip(cells, found, strict=True):
        results[cell.arm.name][cell.seed] = result
    return results, probe(cells, console)


def finish(cells: Sequence[Cell], weights: Mapping[str, float], console: Console) -> list[dict[str, Any]]:
    """The results of all cells, computed where they are missing."""
    return shared(cells, lambda cell, wait: finished(cell, weights, console, wait))


def probe(cells: Sequence[Cell], console: Console) -> dict[str, list[Finding]]:
    """Arm -> probe scores of every layer after pre-training, averaged over the first seeds.

    Only arms with a pre-training of their own are probed, and not those that differ from another arm in its length.
    """
    seeds = sorted({cell.seed for cell in cells})
    told = [cell for cell in cells if cell.seed in seeds[: cell.size.probed] and not needs(cell, {})]
    found: dict[str, list[list[Finding]]] = {}
    for cell, scores in zip(told, shared(told, lambda cell, wait: probed(cell, console, wait)), strict=True):
        found.setdefault(cell.arm.name, []).append(scores)
    return {arm: averaged(of_seeds) for arm, of_seeds in found.items()}


def shared(cells: Sequence[Cell], work: Callable[[Cell, bool], Result]) -> list[Result]:
    """``work(cell, wait)`` for every cell, in order.

    A first pass works on cells that no other process holds; a second one waits for the others and reads their results.
    """
    for cell in cells:
        with suppress(InUseError):
            work(cell, False)
    return [work(cell, True) for cell in cells]


def prepare_start(out: Path, size: Size, console: Console) -> None:
    """Trains ``out/start``, the student that all arms start from; ``out/start_fed`` adds the teachers' tokens."""
    cell, bases = Cell(out, ARMS[NOTHING], START_SEED, size), out / "bases"
    changes: dict[str, Any] = {
        "seed": START_SEED,
        "output": str(out / "start"),
        "student": {"llm": str(bases / "llm"), "encoder": str(bases / "tower")},
        "data": rows_of(cell, "pretrain.json"),
        "optimization": {"max_steps": size.start_steps},
    }
    run = load_run("study/start", changes=(changes,))
    with locked(cell.place, console, wait=True):
        _prepare_tower(bases)
        if not is_finished(run):
            prepare_world(cell, console)
            train_whole(run, Stopwatch(out / "start_seconds.json"), "start", console)
        if not (out / "start_fed").exists():
            save_fed(run.output, [bases / teacher for teacher in TOLD], out / "start_fed")


def require_upper_mark(out: Path, size: Size, console: Console) -> None:
    """Refuses a setting in which the teachers' features do not help as input: predicting them could not help, either.

    The choosing seed decides, so that no reported run does.

    Raises:
        TrainingError: names both accuracies.
    """
    small = _at_one_number(size)
    cells = [Cell(out, ARMS[arm], CHOOSING_SEED, small) for arm in (NOTHING, FEEDING)]
    rows = [found["labels"][str(size.chosen_at)] for found in finish(cells, {}, console)]
    without, fed = map(mean_accuracy, rows)
    if fed - without < size.margin:
        raise TrainingError(
            f"with {size.chosen_at} labels '{FEEDING}' answers {fed:.1%} of the questions, '{NOTHING}' {without:.1%}: "
            f"expected at least {100 * size.margin:.0f} points more, or the arms cannot be told apart; "
            "pre-train longer (study.arms.FULL)"
        )


def _at_one_number(size: Size) -> Size:
    return replace(size, labels={size.chosen_at: size.labels[size.chosen_at]})


def choose_weights(out: Path, size: Size, arms: Sequence[Arm], console: Console) -> dict[str, float]:
    """Arm -> weight of its losses: the one of ``WEIGHTS`` with the highest accuracy on the choosing seed."""
    small = _at_one_number(size)
    tried = [(arm.name, weight) for arm in arms if arm.supervised for weight in WEIGHTS]
    found = finish([Cell(out, ARMS[name], CHOOSING_SEED, small, weight) for name, weight in tried], {}, console)
    reached = {one: mean_accuracy(row["labels"][str(size.chosen_at)]) for one, row in zip(tried, found, strict=True)}
    return {name: max(WEIGHTS, key=lambda weight: reached[name, weight]) for name in dict(tried)}


def mean_accuracy(kinds: Mapping[str, Sequence[int]]) -> float:
    """Mean accuracy over the kinds of questions seen in training, from ``{kind: [right, asked]}``."""
    return statistics.fmean(right / asked for kind, (right, asked) in kinds.items() if kind != NEAREST)


def _prepare_tower(bases: Path) -> None:
    copy_bases(bases)
    if (bases / "tower").exists():
        return
    images = np.stack([draw_scene(START_SEED, index).image for index in range(100)])
    pixels = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25
    with new_folder(bases / "tower") as partial:
        partial.mkdir()
        save_tower(bases / "encoder_contrastive", pixels, partial)


def _require_same(out: Path, size: Size) -> None:
    """Refuses a folder with results of other sizes or recipes. Versions of packages may differ."""
    recipes = sorted({"study/start", *(recipe for arm in ARMS.values() for recipe in (arm.pt, arm.ift))})
    runs = {name: load_run(name).model_dump(mode="json") for name in recipes}
    file, wanted = out / "study.json", json.loads(json.dumps({"size": asdict(size), **runs}))
    if not file.exists():
        write_text(file, json.dumps(wanted, indent=1))
        return
    had = json.loads(file.read_text(encoding="utf-8"))
    if other := [part for part in wanted if had.get(part) != wanted[part]]:
        raise ConfigError(
            f"'{out}' holds results of another {', '.join(other)}, which cannot be compared with new ones: "
            "choose another --out"
        )
