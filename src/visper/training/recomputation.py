"""How many layers are recomputed in the backward pass, and whether the run fits its GPU, before weights are loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import PartialState

from visper.common.console import Console, announce
from visper.common.ranks import first_decides
from visper.config import Run
from visper.training.output import saved_run

EstimateMemory = Callable[[Run, int], tuple[float, str]]
"""The run and its number of processes -> share of the layers to recompute (a given one stays), and why (one line);
warns where the run does not fit."""


def decide_recomputation(run: Run, processes: PartialState, estimate: EstimateMemory | None, console: Console) -> Run:
    """``gradient_checkpointing: auto`` becomes a share of the layers, the same on every process: the one that the
    interrupted run had, none on a CPU, else what ``estimate`` says, which is asked about a given share, too."""
    asked = run.optimization.gradient_checkpointing == "auto"

    def decided() -> tuple[float, str]:
        before = saved_run(Path(run.output))
        if before is not None:
            return before.optimization.recomputation, "as before" if asked else ""
        if not torch.cuda.is_available():
            return 0.0, ""
        if estimate is None:
            return 1.0, "all layers" if asked else ""
        return estimate(run, processes.num_processes)

    share, why = first_decides(decided)
    if why:
        announce(console, "recomputed" if asked else "memory", why)
    if not asked:
        return run
    return run.model_copy(
        update={"optimization": run.optimization.model_copy(update={"gradient_checkpointing": share})}
    )
