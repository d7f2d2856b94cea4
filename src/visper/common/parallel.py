"""A parallel ``map`` over all cores that keeps the items' order, and what loader processes do when they start."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from visper.common.console import track

Item = TypeVar("Item")
Result = TypeVar("Result")
CHUNK = 64
FEW = 4000  # for fewer items, starting processes takes longer than it saves


def in_order(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    description: str,
    quiet: bool = False,
    workers: int | None = None,
) -> Iterator[Result]:
    """The results of ``function`` for all items, in order, with a progress bar.

    The work is done by ``DataLoader`` processes, as in training. For fewer than ``FEW`` items it is done in this
    process, and torch is not imported.

    Args:
        function: picklable; an exception that it raises ends the iteration.
        items: picklable.
        workers: processes; default: one per core, or none for few items.
    """
    if workers is None:
        workers = num_cores() if len(items) >= FEW else 0
    if not workers:
        return iter(track(map(function, items), description=description, total=len(items), quiet=quiet))

    import torch
    from torch.utils.data import DataLoader

    # A separate generator: a loader draws a seed, and if it drew from the global one, a run that fills the cache would
    # start with other weights than a run that finds it filled.
    chunk = max(1, min(CHUNK, len(items) // (4 * workers)))
    each: Any = _Each(function, items)
    loader: DataLoader[Any] = DataLoader(
        each,
        chunk,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=end_with_parent,
        generator=torch.Generator(),
    )
    everything = (result for results in loader for result in results)
    return iter(track(everything, description=description, total=len(items), quiet=quiet))


def num_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def end_with_parent(worker: int = 0) -> None:
    """Ends this loader process within a second once the process that started it is gone, even if that was killed.

    torch's loader processes notice this too, but then they wait until their last results have been read: forever, if
    these are larger than a pipe's buffer.

    Args:
        worker: its number, which ``DataLoader`` passes to its ``worker_init_fn``; not used.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    forked_by = os.getppid()  # a fork server, if that is how processes start

    def watch() -> None:
        while parent.is_alive() and os.getppid() == forked_by:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)  # without the cleanup that waits

    threading.Thread(target=watch, name="end with parent", daemon=True).start()


def heed_only_parent() -> None:
    """Makes this loader process ignore SIGTERM, except from the process that started it.

    Schedulers send SIGTERM to all processes of a job. Python sends it to the loader processes that are left when their
    parent ends, and then waits for them: forever, if they ignored it.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
            pass
        os._exit(0)  # with an error or by a signal, torch would raise one in the parent

    threading.Thread(target=wait, name="heed only parent", daemon=True).start()


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory for reuse in this process; does nothing with another C library.

    By default glibc returns the memory of each batch of images to the kernel, which clears every page again for the
    next batch: about 600 page faults per image in pre-training, 1.6 ms of CPU time. Blocks above 32 MiB are returned in
    any case.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 32 * 2**20)


class _Each(Generic[Item, Result]):
    def __init__(self, function: Callable[[Item], Result], items: Sequence[Item]) -> None:
        self.function = function
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Result:
        return self.function(self.items[index])
