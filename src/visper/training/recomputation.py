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
    given = run.optimization.gradient_checkpointing

    def decided() -> tuple[float, str]:
        before = saved_run(Path(run.output))
        if before is not None:
            return before.optimization.recomputation, "as before" if given == "auto" else ""
        if not torch.cuda.is_available():
            return 0.0, ""
        return estimate(run, processes.num_processes) if estimate is not None else (1.0, "all layers")

    share, why = first_decides(decided)
    if given != "auto":
        if estimate is not None and why:
            announce(console, "memory", why)
        return run
    if why:
        announce(console, "recomputed", why)
    return run.model_copy(
        update={"optimization": run.optimization.model_copy(update={"gradient_checkpointing": share})}
    )
