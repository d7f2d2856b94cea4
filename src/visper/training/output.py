"""A run's output folder: its contents, which run owns it, and which settings may change on resume.

Layout of a stage's output::

    run.yaml        the resolved run that owns the folder
    content.json    digests of the rows, images and initial weights
    adapter/        with 'lora': the updates (merged in model/) and the projector in peft's format, if that is all
    model/          a plain LLaVA folder: weights, tokenizer, processor, generation config, run.yaml; written last
    distillation/   with distillation: predictors, logit scales and query matrices, for `visper look` and probing
    checkpoints/    complete checkpoints to resume from
    log.jsonl       every logged value
    drawings/       with 'evaluation.draw': drawn predictions for held-out images, one folder per evaluation
    dropped.jsonl   dropped rows, with the reason
    .lock           held while a run uses the folder; .lock.json names the process
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from visper.common.console import Console
from visper.common.errors import ConfigError, TrainingError
from visper.common.files import is_leftover, refuse_dangling_link, remove_leftovers, write_text
from visper.common.lock import HOLDER, LOCK
from visper.common.manifest import require_undamaged
from visper.config import Run, load_run, run_text
from visper.model.revisions import with_commits
from visper.training.checkpoint import FOLDER, STAGING, checkpoints, newest_undamaged
from visper.training.content import CONTENT, require_finished_with

MAY_DIFFER = (
    "output",
    "evaluation",
    "evaluation.*",
    "logging.*",
    "launch.*",
    "data.workers",
    "data.drop_limit",
    "optimization.micro_batch",
    "optimization.gradient_checkpointing",
    "optimization.packing",
    "optimization.attention",
    "optimization.compile",
)
"""Keys that may change when a run is resumed: they set how it is split, logged and stored, not what it computes."""
RUN = "run.yaml"
"""The resolved run, in the output folder and in each of its checkpoints."""
DROPPED = "dropped.jsonl"
SHOWN = 5
"""Maximum number of differing keys named in a message."""
LOG = "log.jsonl"
"""The log file; its first line is written after the first step."""
DRAWINGS = "drawings"
"""Folder in the output with one subfolder per evaluation, for drawn predictions."""
LOG_SUFFIXES = (".log", ".out", ".err")
"""Suffixes of files to which the shell may redirect the run's output, in the folder, before the run starts."""


def is_finished(run: Run) -> bool:
    """Whether the output folder holds this run, finished and undamaged.

    Raises:
        ConfigError: it holds another run, or this one finished from other rows, teachers or initial weights than those
            that are there now, or with the weights of another step than it asks for now.
        DataError: the finished model is damaged.
    """
    output = Path(run.output)
    saved = _refuse_other(run, output)
    if not (output / "model" / RUN).is_file():
        return False
    require_finished_with(run)
    _require_weights_of(run, saved)
    require_undamaged(output / "model")
    return True


def require_separate_outputs(runs: Sequence[Run]) -> None:
    """Checks that there are runs, and that no two have the same output folder.

    Raises:
        ConfigError: there are none, or it names the runs and the folder.
    """
    if not runs:
        raise ConfigError("a pipeline of no stages: give the runs of its stages, in order")
    places: dict[Path, Run] = {}
    for run in runs:
        other = places.setdefault(Path(run.output).resolve(), run)
        if other is not run:
            raise ConfigError(
                f"'{other.name}' and '{run.name}' have the same output '{run.output}': give each its own, in its recipe"
            )


def _require_weights_of(run: Run, saved: Run | None) -> None:
    """Checks that the finished model has the weights that ``run`` asks for: the last ones, or the best ones."""
    there, here = (None if one is None else _chosen_by(one) for one in (saved, run))
    if there != here:
        shown = [f"the best by {measure}" if measure else "the last ones" for measure in (there, here)]
        raise ConfigError(
            f"'{run.output}' holds this run, finished with {shown[0]} of its weights, but evaluation now asks for "
            f"{shown[1]}: remove '{run.output}' to train again, or set evaluation.use_best and evaluation.best as in "
            "its run.yaml"
        )


def _chosen_by(run: Run) -> str | None:
    return run.evaluation.measure if run.evaluation is not None and run.evaluation.use_best else None


def check_output(run: Run, output: Path, resume: bool) -> None:
    """Checks that the run may write into its output folder; writes nothing.

    A folder in which no run has completed a step is free for any run, so that a failed start does not claim it.

    Raises:
        ConfigError: the folder holds another run, this run finished, this run unfinished and ``resume`` is False, or
            files that no run wrote; or it is a dangling link.
    """
    refuse_dangling_link(output)
    _refuse_other(run, output)
    if (output / "model").exists():
        raise ConfigError(
            f"output '{output}' holds this run, finished: remove it to train again, or choose another output; to "
            "continue training, start a new run from it (start_from)"
        )
    if checkpoints(output) and not resume:
        raise ConfigError(f"output '{output}' holds checkpoints of this run: add --resume, or choose another output")
    if not output.exists() or (output / RUN).exists():
        return
    files = [path for path in output.iterdir() if path.name not in (LOCK, HOLDER) and path.suffix not in LOG_SUFFIXES]
    foreign = [path.name for path in files if not is_leftover(path)]
    if foreign:
        raise ConfigError(
            f"output '{output}' exists, is not empty (it holds '{foreign[0]}') and has no run.yaml written by visper: "
            "choose another output"
        )


def claim_output(run: Run, output: Path, content: dict[str, str]) -> None:
    """Records this run as the owner of the locked folder, just before training; removes a killed run's leftovers."""
    remove_leftovers([*output.iterdir(), *(output / DRAWINGS).glob("*/.*")])
    shutil.rmtree(output / FOLDER / STAGING, ignore_errors=True)
    write_text(output / RUN, run_text(run))  # first: without it, the rest is taken for somebody else's files
    write_text(output / CONTENT, json.dumps(content, indent=1))


def saved_run(output: Path) -> Run | None:
    """The run that has completed a step in the output folder; None if there is none, so the folder may be reused."""
    if not checkpoints(output) and not (output / "model").exists() and not (output / LOG).exists():
        return None
    return load_run(output / RUN) if (output / RUN).is_file() else None


def newest_own(run: Run, output: Path, console: Console) -> Path | None:
    """``newest_undamaged``, unless it was copied from another run, whose learning rates it would go on with.

    Raises:
        ConfigError: all are damaged, or the newest was written with other settings; the message names them.
    """
    found = newest_undamaged(output, console)
    if found is not None:
        _require_same(run, load_run(found / RUN), f"checkpoint '{found}' is of")
    return found


@contextmanager
def naming_saved_weights(output: Path) -> Iterator[None]:
    """Turns an error while the stage's results are written, such as a full disk, into one that says what is not lost.

    Raises:
        TrainingError: the results could not be written.
    """
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"the run has trained to its end, but its results could not be written ({error}). The last checkpoint in "
            f"'{output / FOLDER}' has its weights: free some space, then repeat the command (visper train: "
            "with --resume), which only writes the results"
        ) from error


def _refuse_other(run: Run, output: Path) -> Run | None:
    """The run that the folder holds, if any. Raises ConfigError if it is another one."""
    saved = saved_run(output)
    if saved is not None:
        _require_same(run, saved, f"output '{output}' holds")
    return saved


def _require_same(run: Run, saved: Run, what: str) -> None:
    there, here = (_flat(one.model_dump(mode="json", by_alias=True)) for one in (saved, with_commits(run, saved)))
    different = [
        f"{key} is {_shown(there.get(key))} there, {_shown(here.get(key))} here"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key) and not any(fnmatchcase(key, pattern) for pattern in MAY_DIFFER)
    ]
    if different:
        more = f" and {len(different) - SHOWN} more" if len(different) > SHOWN else ""
        raise ConfigError(
            f"{what} another run: {'; '.join(different[:SHOWN])}{more}. Choose another output, or set these keys as in "
            "its run.yaml"
        )


def _shown(value: Any) -> str:
    """A value as a recipe writes it, on one line, without the keys of its entries that are not set."""
    if isinstance(value, list):
        value = [
            {k: v for k, v in one.items() if v not in (None, {})} if isinstance(one, dict) else one for one in value
        ]
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=sys.maxsize)
    return text.removesuffix("...\n").strip()


def _flat(settings: Any, place: str = "") -> dict[str, Any]:
    """Flattens nested settings to ``{"optimization.lr": 1e-3}``; lists are kept as values."""
    if not isinstance(settings, dict) or not settings:
        return {place: settings}
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= _flat(value, f"{place}.{key}" if place else key)
    return found
