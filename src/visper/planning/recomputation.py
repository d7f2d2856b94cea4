"""Whether a run fits the GPU at hand, and how much it recomputes where ``gradient_checkpointing: auto`` asks."""

from __future__ import annotations

import logging
import time

import torch

from visper.common.errors import VisperError
from visper.common.gpus import memory_of
from visper.config import Run

logger = logging.getLogger(__name__)


def least_recomputation(run: Run, processes: int) -> tuple[float, str]:
    """The least share of the layers with which ``run`` fits the GPU at hand, or the share that it sets, and why, in
    words for the log.

    The training step is traced without values, once or twice (``fake_run``), before any weights are loaded. Where
    nothing fits, or no estimate can be made, it is every layer. A run that does not fit is a warning too, which names
    the first change with which it does.

    Args:
        run: what trains.
        processes: how many train it, one a GPU; the GPUs are taken to be alike.
    """
    from visper.planning.fit import Fit  # not at the top: only GPUs need it, and every training imports this file
    from visper.planning.memory import Machine

    began, asked = time.process_time(), run.optimization.gradient_checkpointing == "auto"
    machine = Machine(processes, memory_of(torch.device("cuda", torch.cuda.current_device())))
    try:
        fit = Fit(run, machine)
    except (VisperError, ValueError, OSError) as error:
        return 1.0, f"{'all layers: ' if asked else ''}no estimate of the memory can be made ({error})"
    share = fit.settings.checkpointing
    assert machine.memory is not None
    peak = f"estimated peak {fit.memory.total / 1e9:.1f} of {machine.memory / 1e9:.0f} GB"
    if not fit.fits:
        lever = fit.lever()
        change = f"first change that fits: {lever.changes}" if lever else "no setting makes it fit"
        how = "even if all layers are recomputed" if asked else f"with {share:g} of the layers recomputed"
        logger.warning(f"the run may not fit its GPU {how}: {peak}; {change}")
    return share, f"{share:g} of the layers: {peak} (found in {time.process_time() - began:.0f} CPU s)"
