"""A probe as a run: a frozen model with one head per layer, trained on a set of images.

The heads are the paper's (arXiv 2412.09585, section on probing): a one-layer Perceiver resampler with trainable queries
reads a layer's whole output, with smooth-L1 as the only loss. All layers are trained in one pass. A probe is an
ordinary stage, so resuming, stored targets and several processes work as in training.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visper.common.errors import ConfigError
from visper.common.files import write_text
from visper.config import Position, Run, Target, load_run
from visper.data.rows.formats import IMAGE_SUFFIXES
from visper.data.rows.records import DropList
from visper.data.rows.sources import open_records
from visper.data.sampler import spread
from visper.evaluation.visualize import PROMPT
from visper.model.hub import sizes_of
from visper.model.student import student_place

MAX_TOKENS = 4096
"""Maximum length of a row: an image, its task tokens and a prompt."""

PROBED_LEVELS = {"depth_anything": {"levels": "last"}}
"""Kind of teacher -> the paper's options for probing: the last level of Depth Anything, not the mean of four."""


def rows_file(output: Path) -> Path:
    """The file of the rows that the heads are trained on, beside ``output``, which belongs to the run."""
    return output.parent / f"{output.name}.probe-rows.json"


def run_of(model: str | Path) -> Run | None:
    """The run that made a model; None if none is saved with it."""
    for file in (Path(model) / "run.yaml", Path(model) / "model" / "run.yaml"):
        if file.is_file():
            return load_run(file)
    return None


def teacher_targets_of(recipe: Run | None, tasks: Sequence[str], where: str) -> dict[str, Target]:
    """Task to probe -> its teacher.

    Raises:
        ConfigError: the recipe has no such task, or its target is the student's own.
    """
    taught = {} if recipe is None or recipe.distillation is None else recipe.distillation.taught
    missing = [task for task in tasks if task not in taught]
    if missing or not tasks:
        raise ConfigError(
            f"{where} has no teacher for {missing or 'any task'}; its tasks with a teacher are {list(taught)}: choose "
            "among these, or name another recipe with --teachers, such as quickstart/pt"
        )
    return {task: taught[task].target for task in tasks}


def probe_run(
    model: str | Path,
    output: Path,
    targets: dict[str, Target],
    rows: Path,
    images: Path,
    overrides: Sequence[str] = (),
) -> Run:
    """The run that trains the probes of ``model``; ``overrides`` change it, such as ``optimization.epochs=1``.

    Raises:
        ConfigError: ``model`` is itself the output of a probe.
    """
    folder = student_place(model)
    llm = sizes_of(folder, "the model to probe").get_text_config()
    layers, longest = llm.num_hidden_layers, getattr(llm, "max_position_embeddings", MAX_TOKENS)
    changes: dict[str, Any] = {
        "name": f"probe-{output.name}",
        "output": str(output),
        "start_from": folder,
        "data": {"sources": [{"json": str(rows), "images": str(images)}], "max_tokens": min(longest, MAX_TOKENS)},
        "distillation": {"tasks": {task: _probed(target, layers) for task, target in targets.items()}},
    }
    made = run_of(model)
    if made is not None:
        tasks = made.distillation.tasks.values() if made.distillation else ()
        frozen = "llm" in made.optimization.freeze
        if frozen and any(task.at is Position.SEQUENCE for task in tasks):
            raise ConfigError(f"'{model}' is itself a probe: give the model that it probed, '{made.start_from}'")
        changes["data"]["geometry"] = made.data.geometry.value
        changes["optimization"] = {"precision": made.optimization.precision}
    return load_run("_parts/_probe", overrides, (changes,))


def _probed(target: Target, layers: int) -> dict[str, Any]:
    given = target.model_dump(mode="json", exclude_none=True) | PROBED_LEVELS.get(target.kind, {})
    return {
        "target": given,
        "at": "sequence",
        "layers": list(range(1, layers + 1)),
        "head": {"kind": "resampler", "queries": "matrix"},
        "loss": {"smooth_l1": 1.0},
        "weight": 1.0,
    }


def images_below(folder: Path) -> list[Path]:
    """The image files below a folder, sorted by name.

    Raises:
        ConfigError: there are none.
    """
    found = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise ConfigError(f"'{folder}' has no images ({', '.join(IMAGE_SUFFIXES)}): give a folder with images")
    return found


def write_rows(
    images: Path, file: Path, named_by: Path | None = None, limit: int | None = None, fixed: bool = False
) -> int:
    """Writes a row for each image below a folder: one prompt and the answer "." (a caption would tell its content).

    Args:
        file: file of the rows; not written again if it has the same content.
        named_by: use only the images that the rows of this JSON file name, in their order.
        limit: use only this many images, evenly spaced.
        fixed: whether heads have been trained on the rows in ``file``.

    Returns:
        The number of rows.

    Raises:
        ConfigError: there are no images, or the rows are ``fixed`` and would change.
    """
    turns = [{"from": "human", "value": f"<image>\n{PROMPT}"}, {"from": "gpt", "value": "."}]
    if named_by is None:
        names = [each.relative_to(images).as_posix() for each in spread(images_below(images), limit)]
    else:
        records = open_records([(named_by, images)], DropList())
        found = dict.fromkeys(shown.path for record in records for shown in record.images)
        names = [Path(path).relative_to(images).as_posix() for path in spread(list(found), limit)]
    text = json.dumps([{"id": name, "image": name, "conversations": turns} for name in names])
    same = file.is_file() and file.read_text(encoding="utf-8") == text
    if fixed and not same:
        raise ConfigError(
            f"the probe was trained on the images in '{file}', but these are others ({len(names)}): give its --images, "
            "--rows and --limit again, or another --out"
        )
    if not same:
        write_text(file, text)
    return len(names)
