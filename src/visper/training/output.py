"""A run's output folder: whose it is, what may change when its run is resumed, what lies in it.

Layout of a stage's output::

    run.yaml        the resolved run (whose folder this is)
    content.json    digests of the rows, images and weights that it is trained on
    adapter/        with 'lora': the low-rank updates in peft's format; model/ holds them merged
    model/          a plain LLaVA folder: weights, tokenizer, processor, generation config, run.yaml; written last
    distillation/   with distillation: predictors, logit scales and query matrices, for looking and probing
    checkpoints/    what is needed to continue, complete or absent
    log.jsonl       every logged value
    drawings/       with 'evaluation.draw': predictions of held-out images, a folder for each evaluation
    dropped.jsonl   rows left out, with the reason
    .lock           while a run is in the folder; .lock.json says which process
"""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from visper.common.errors import ConfigError
from visper.common.files import is_leftover, remove_leftovers, write_text
from visper.common.lock import HOLDER, LOCK
from visper.config import Run, load_run, run_text
from visper.model.revisions import with_commits
from visper.training.checkpoint import FOLDER, STAGING, checkpoints
from visper.training.content import CONTENT

MAY_DIFFER = (
    "output",
    "evaluation",
    "evaluation.*",
    "logging.*",
    "launch.*",
    "data.workers",
    "optimization.micro_batch",
    "optimization.gradient_checkpointing",
    "optimization.packing",
    "optimization.attention",
    "optimization.compile",
)
"""Keys that may change when a run is resumed: how it is split, logged and stored, not what it computes."""
DROPPED = "dropped.jsonl"
SHOWN = 5
"""Differing keys that a message names."""
LOG = "log.jsonl"
"""Its first line is written after the first step."""
LOG_SUFFIXES = (".log", ".out", ".err")
"""Files that the shell may have redirected into the folder before the run was there."""


def is_finished(run: Run) -> bool:
    """Whether the output holds this run, finished. Raises ConfigError if it holds another one."""
    output = Path(run.output)
    _refuse_other(run, output)
    return (output / "model" / "run.yaml").is_file()


def check_output(run: Run, output: Path, resume: bool) -> None:
    """Checks that the run may write into its output folder, and writes nothing.

    A folder in which no run has taken a step is free for any run, so that a failed start locks nothing.

    Raises:
        ConfigError: it holds another run, a finished one, an unfinished one and ``resume`` was not asked for, or
            content that no run wrote.
    """
    _refuse_other(run, output)
    if (output / "model").exists():
        raise ConfigError(
            f"output '{output}' holds this run, finished: remove it to train again, or choose another output; to train "
            "it further, start a new run from it (start_from)"
        )
    if checkpoints(output) and not resume:
        raise ConfigError(f"output '{output}' holds checkpoints of this run: add --resume, or choose another output")
    if not output.exists() or (output / "run.yaml").exists():
        return
    ours = (LOCK, HOLDER)
    files = [path for path in output.iterdir() if path.name not in ours and path.suffix not in LOG_SUFFIXES]
    foreign = [path.name for path in files if not is_leftover(path)]
    if foreign:
        raise ConfigError(
            f"output '{output}' exists, is not empty (it holds '{foreign[0]}') and has no run.yaml written by visper: "
            "choose another output"
        )


def claim_output(run: Run, output: Path, content: dict[str, str]) -> None:
    """Makes the locked output folder this run's own, just before it trains; removes a killed run's leftovers."""
    remove_leftovers(output.iterdir())
    shutil.rmtree(output / FOLDER / STAGING, ignore_errors=True)
    write_text(output / CONTENT, json.dumps(content, indent=1))
    write_text(output / "run.yaml", run_text(run))


def saved_run(output: Path) -> Run | None:
    """The run that has taken a step in the output folder; None: none has, and what is there may be replaced."""
    if not checkpoints(output) and not (output / "model").exists() and not (output / LOG).exists():
        return None
    return load_run(output / "run.yaml") if (output / "run.yaml").is_file() else None


def _refuse_other(run: Run, output: Path) -> None:
    saved = saved_run(output)
    if saved is None:
        return
    theirs, ours = _flat(saved.model_dump(mode="json")), _flat(with_commits(run, saved).model_dump(mode="json"))
    different = [
        f"{key} is {theirs.get(key)!r} there, {ours.get(key)!r} here"
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key) != ours.get(key) and not any(fnmatchcase(key, pattern) for pattern in MAY_DIFFER)
    ]
    if different:
        more = f" and {len(different) - SHOWN} more" if len(different) > SHOWN else ""
        raise ConfigError(
            f"output '{output}' holds another run: {'; '.join(different[:SHOWN])}{more}. Choose another output, or "
            "set them back as in its run.yaml"
        )


def _flat(settings: Any, place: str = "") -> dict[str, Any]:
    """Nested settings as ``{"optimization.lr": 1e-3}``; lists are values."""
    if not isinstance(settings, dict) or not settings:
        return {place: settings}
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= _flat(value, f"{place}.{key}" if place else key)
    return found
