"""Checks before training that a run fits the GPU, and resolves ``gradient_checkpointing: auto``."""

from __future__ import annotations

import logging
import time

import torch

from visper.common.errors import VisperError
from visper.common.gpus import memory_of
from visper.config import Run

logger = logging.getLogger(__name__)


def least_recomputation(run: Run, processes: int) -> tuple[float, str]:
    """The share of the layers to recompute, and the reason as text for the log.

    For ``gradient_checkpointing: auto`` it is the smallest share with which ``run`` fits the current GPU, otherwise the
    share that the run sets; 1 if no share fits or memory cannot be estimated. The training step is traced on fake
    tensors, once or twice (``fake_run``), before any weights are loaded. If the run does not fit, a warning names the
    first change that makes it fit.

    Args:
        processes: the number of training processes, one per GPU; all GPUs are assumed to be the same.
    """
    from visper.planning.memory import Machine  # here: only GPUs need it, and every run imports this file
    from visper.planning.plan import Plan

    began, asked = time.process_time(), run.optimization.gradient_checkpointing == "auto"
    machine = Machine(processes, memory_of(torch.device("cuda", torch.cuda.current_device())))
    try:
        plan = Plan(run, machine)
    except Exception as error:
        logger.debug("memory cannot be estimated", exc_info=True)
        kind = "" if isinstance(error, VisperError) else f"{type(error).__name__}: "
        return 1.0, f"{'all layers: ' if asked else ''}memory cannot be estimated ({kind}{error})"
    share = plan.settings.checkpointing
    assert machine.memory is not None
    peak = f"estimated peak {plan.memory.total / 1e9:.1f} of {machine.memory / 1e9:.0f} GB"
    if not plan.fits:
        change = f"first change that fits: {plan.lever.changes}" if plan.lever else "no setting makes it fit"
        how = "even if all layers are recomputed" if asked else f"with {share:g} of the layers recomputed"
        logger.warning(f"the run may not fit its GPU {how}: {peak}; {change}")
    return share, f"{share:g} of the layers: {peak} (found in {time.process_time() - began:.0f} CPU s)"
