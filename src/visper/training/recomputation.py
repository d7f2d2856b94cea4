"""Decides, before weights are loaded, how many layers are recomputed in the backward pass (gradient checkpointing)."""

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
"""Takes a run and its number of processes; returns the share of layers to recompute (a number set in the run is kept)
and the reason in one line. Logs a warning if the run does not fit."""


def decide_recomputation(run: Run, processes: PartialState, estimate: EstimateMemory | None, console: Console) -> Run:
    """Replaces ``gradient_checkpointing: auto`` by a share of the layers, the same on every process.

    The share is that of the interrupted run, else 0 on a CPU, else the one from ``estimate``. With a number instead of
    ``auto``, ``estimate`` is only called to log whether the run fits.
    """
    auto = run.optimization.gradient_checkpointing == "auto"

    def decided() -> tuple[float, str]:
        before = saved_run(Path(run.output))
        if before is not None:
            return before.optimization.recomputation, "as before" if auto else ""
        if not torch.cuda.is_available():
            return 0.0, ""
        if estimate is None:
            return 1.0, "all layers" if auto else ""
        return estimate(run, processes.num_processes)

    share, why = first_decides(decided)
    if why:
        announce(console, "recomputed" if auto else "memory", why)
    if not auto:
        return run
    return run.model_copy(
        update={"optimization": run.optimization.model_copy(update={"gradient_checkpointing": share})}
    )
