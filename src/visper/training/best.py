"""The best checkpoint by a held-out value, among evaluations that measured the same.

A resumed run may name other held-out rows or questions, and their values cannot be compared. So each evaluation's line
in the log has ``MEASURED_ON``, a digest of what was measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from visper.common.cache import key
from visper.common.errors import TrainingError
from visper.common.manifest import find_damage
from visper.config import Evaluation
from visper.data.rows.table import Records
from visper.training.checkpoint import FOLDER, checkpoint_name
from visper.training.content import rows_content
from visper.training.output import LOG

BEST = "best.json"
"""File in the run's output with value, step and checkpoint of the best evaluation so far."""
MEASURED_ON = "measured_on"
"""Name of the digest in ``log.jsonl`` and ``best.json``."""


def measured_on(settings: Evaluation, rows: Records | None, order: Sequence[int], asked: str) -> str:
    """A digest of the rows, or of the questions, that the value ``settings.measure`` is measured on.

    Args:
        rows, order: the rows of ``loss_on``, and which of them are measured.
        asked: ``held_out.Evaluator.asked``.
    """
    if settings.higher_is_better:
        return key(str(settings.benchmark), settings.limit, settings.max_new_tokens, asked)
    assert rows is not None, "a loss is measured on rows"
    chosen = rows.rows[list(order)]
    return key(*rows_content(rows).values(), chosen.tobytes())


def earlier_values(output: Path, measure: str, step: int) -> Iterator[tuple[float, int, str | None]]:
    """Value, step and ``MEASURED_ON`` of the evaluations in the log up to ``step`` whose checkpoints still exist."""
    log = output / LOG
    for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else ():
        entry = json.loads(line)
        kept = (output / FOLDER / checkpoint_name(entry["step"])).is_dir()
        if measure in entry and entry["step"] <= step and kept:
            yield entry[measure], entry["step"], entry.get(MEASURED_ON)


def best_checkpoint(output: Path, measure: str, on: str) -> Path:
    """The checkpoint that ``best.json`` names.

    Args:
        on: digest of what the run measures now, see ``measured_on``.

    Raises:
        TrainingError: no evaluation gave a finite value of this measure, it was measured on something else, or the
            checkpoint, which may be much older than the newest one, is damaged or was removed.
    """
    best = json.loads((output / BEST).read_text(encoding="utf-8")) if (output / BEST).is_file() else {}
    if best.get("measure") != measure:
        raise TrainingError(f"'{output}' has no best checkpoint by {measure}: no evaluation gave a finite value of it")
    if best.get(MEASURED_ON) != on:
        raise TrainingError(
            f"the best checkpoint of '{output}' by {measure} was chosen on other rows or questions than 'evaluation' "
            "names now: set 'evaluation' as it was, or set evaluation.use_best=false and add --resume"
        )
    found = output / FOLDER / str(best["checkpoint"])
    if (damage := find_damage(found)) is not None:
        raise TrainingError(
            f"the best checkpoint by {measure}, '{found}', is damaged or was removed ({damage}): restore it, or set "
            "evaluation.use_best=false and add --resume to finish with the last weights"
        )
    return found
