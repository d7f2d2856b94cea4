"""Starting a run's processes on this machine, through torch's own launcher."""

from __future__ import annotations

import os
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from visper.common.errors import ConfigError, ProcessFailedError, StoppedError
from visper.config import Launch
from visper.training.parallel.deepspeed import require_deepspeed


def start_processes(launch: Launch, command: Sequence[str]) -> bool:
    """Runs ``visper COMMAND`` in as many processes as ``launch`` says, and waits for them.

    Returns:
        False where there is nothing to start: one process is asked for, or a launcher has started this one.

    Raises:
        ConfigError: a launcher started another number of processes on this machine.
        ProcessFailedError: one of them failed; it has printed why.
    """
    started = os.environ.get("LOCAL_WORLD_SIZE")
    if started is not None:
        if launch.processes not in (1, int(started)):
            raise ConfigError(
                f"launch.processes is {launch.processes}, but a launcher started {started} on this machine: "
                "leave it out under torchrun"
            )
        return False
    if launch.processes == 1:
        return False
    require_deepspeed(launch)
    from torch.distributed.run import main

    try:
        main(["--standalone", f"--nproc-per-node={launch.processes}", "-m", "visper", *command])
    except SignalException as error:  # the launcher has passed the signal on and waited, 30 s at most
        raise StoppedError(
            f"told to stop ({error.sigval.name}): each process has saved and ended; add --resume"
        ) from error
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise ProcessFailedError(
            f"process {rank} of {launch.processes} ended with exit code {failure.exitcode}, the others were stopped: "
            "its own message stands above. What was saved is whole: mend the cause, then add --resume"
        ) from error
    return True
