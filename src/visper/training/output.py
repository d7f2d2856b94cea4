"""A run's output folder: whose it is, what may change when its run is resumed, what lies in it.

Layout of a stage's output::

    run.yaml        the resolved run (whose folder this is)
    adapter/        with 'lora': the low-rank updates in peft's format; model/ holds them merged
    model/          a plain LLaVA folder: weights, tokenizer, processor, generation config, run.yaml; written last
    distillation/   PT only: predictors, logit scales and query matrices, for looking and probing
    checkpoints/    what is needed to continue, complete or absent
    log.jsonl       every logged value
    dropped.jsonl   rows left out, with the reason
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from visper.common.errors import ConfigError
from visper.common.files import is_leftover, remove_leftovers, write_text
from visper.config import Run, load_run, run_text
from visper.model.revisions import with_commits
from visper.training.checkpoint import FOLDER, STAGING, checkpoints

MAY_DIFFER: dict[str, Any] = {
    "output": True,
    "logging": True,
    "launch": True,
    "data": {"workers"},
    "optimization": {"micro_batch", "gradient_checkpointing", "packing", "attention"},
}
"""What may change when a run is resumed: how it is split, logged and stored, not what it computes."""
DROPPED = "dropped.jsonl"


def is_finished(run: Run) -> bool:
    """Whether the output holds this run, finished. Raises ConfigError if it holds another one."""
    output = Path(run.output)
    _refuse_other(run, output)
    return (output / "model" / "run.yaml").is_file()


def claim_output(run: Run, output: Path, resume: bool) -> None:
    """Makes the output folder this run's own. What another run left there stays as it is.

    Raises:
        ConfigError: it holds another run, a finished one, or an unfinished one and ``resume`` was not asked for.
    """
    _refuse_other(run, output)
    if (output / "model").exists():
        raise ConfigError(
            f"output '{output}' holds this run, finished: remove it to train again, or choose another output"
        )
    if checkpoints(output) and not resume:
        raise ConfigError(f"output '{output}' holds checkpoints of this run: add --resume, or choose another output")
    output.mkdir(parents=True, exist_ok=True)
    # What a run that was killed leaves behind; killed at once, nothing else.
    if not (output / "run.yaml").exists() and any(
        not (is_leftover(path) and path.name.startswith(".run.yaml.")) for path in output.iterdir()
    ):
        raise ConfigError(
            f"output '{output}' is not empty and has no run.yaml written by visper: choose another output"
        )
    remove_leftovers(output.iterdir())
    shutil.rmtree(output / FOLDER / STAGING, ignore_errors=True)
    write_text(output / "run.yaml", run_text(run))


def saved_run(output: Path) -> Run | None:
    """The run that the output folder holds; None: it holds none."""
    return load_run(output / "run.yaml") if (output / "run.yaml").is_file() else None


def _refuse_other(run: Run, output: Path) -> None:
    saved = saved_run(output)
    if saved is None:
        return
    theirs = saved.model_dump(exclude=MAY_DIFFER)
    ours = with_commits(run, saved).model_dump(exclude=MAY_DIFFER)
    different = sorted(key for key in ours if ours[key] != theirs[key])
    if different:
        raise ConfigError(
            f"output '{output}' holds another run (its {', '.join(different)} differ): "
            "choose another output, or give back the settings in its run.yaml"
        )
