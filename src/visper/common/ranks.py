"""Helpers for runs of several processes: decisions of the first process, barriers, errors about lost processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from visper.common.errors import ConfigError, ProcessFailedError, VisperError

Result = TypeVar("Result")

LAUNCHED = "VISPER_LAUNCHED"
"""Environment variable of the processes that ``training.parallel.launch`` starts, which all see the same GPUs."""


def first_decides(work: Callable[[], Result]) -> Result:
    """Runs ``work`` on the first process only; every process returns its result or raises its error.

    Every process must call this. If only the first one raised the error, the others would wait until their timeout.

    Args:
        work: its result and errors must be picklable.
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    result, error = None, None
    if PartialState().is_main_process:
        try:
            result = work()
        except (VisperError, OSError) as found:
            error = found
    with naming_lost_processes():
        result, error = broadcast_object_list([result, error])
    if error is not None:
        if isinstance(error, VisperError):
            error.shared = True
        raise error
    return result


@contextmanager
def naming_lost_processes() -> Iterator[None]:
    """Turns a failed collective in the block into a one-line error: another process has ended or timed out.

    Raises:
        ProcessFailedError: with torch's message; the launcher's message tells which process was lost.
    """
    try:
        yield
    except RuntimeError as error:
        rank, count = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        raise ProcessFailedError(
            f"process {rank} of {count} lost contact with the others ({str(error).splitlines()[0]}): one of them has "
            "ended (see its own message or the launcher's), or takes longer than launch.timeout_minutes"
        ) from error


def wait_for_all() -> None:
    """Waits until every process has reached this call.

    Raises:
        ProcessFailedError: another process is lost, see ``naming_lost_processes``.
    """
    from accelerate import PartialState

    with naming_lost_processes():
        PartialState().wait_for_everyone()


@contextmanager
def first_goes_first() -> Iterator[None]:
    """The first process runs the block, then the others run it.

    Raises:
        ProcessFailedError: another process is lost, see ``naming_lost_processes``.
    """
    from accelerate import PartialState

    first = PartialState().is_main_process
    if not first:
        wait_for_all()
    yield
    if first:
        wait_for_all()


def require_gpu_each() -> None:
    """Refuses more processes on this machine than it has GPUs: two processes on one GPU fail in NCCL.

    With another launcher, a process that sees one GPU may be one of several to which the scheduler gave one each.

    Raises:
        ConfigError: on every process, with both numbers.
    """
    import torch

    started, found = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    own_gpu = found == 1 and LAUNCHED not in os.environ
    if found == 0 or found >= started or own_gpu:
        return
    error = ConfigError(
        f"{started} processes share {found} GPU{'s' * (found > 1)}: start at most one per GPU (launch.processes, or "
        "torchrun's --nproc-per-node), or make more GPUs visible (CUDA_VISIBLE_DEVICES)"
    )
    error.shared = True
    raise error


def require_nccl() -> None:
    """Refuses to run several processes on GPUs if torch was built without NCCL.

    Raises:
        ConfigError: names the installed torch.
    """
    import torch

    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and torch.cuda.is_available() and not torch.distributed.is_nccl_available():
        raise ConfigError(
            f"torch {torch.__version__} was built without NCCL, which processes on GPUs need to exchange tensors: "
            "install a build with it (those of pytorch.org for Linux and CUDA have it), or train with one process"
        )
