"""One function over many items on all cores, the results in the items' order."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from visper.common.console import track

Item = TypeVar("Item")
Result = TypeVar("Result")
CHUNK = 64
FEW = 4000  # for fewer items, starting processes costs more than it gains


def in_order(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    description: str,
    quiet: bool = False,
    workers: int | None = None,
) -> Iterator[Result]:
    """``function`` of every item, in order, whatever the number of processes; with a progress bar.

    Loader processes do the work, as in training: what runs here runs there. For a few items there are none, and
    torch is not imported.

    Args:
        function: picklable; what it raises ends the iteration.
        items: picklable.
        description: of the progress bar.
        quiet: no progress bar.
        workers: processes; default: one a core, or none for a few items.
    """
    if workers is None:
        workers = num_cores() if len(items) >= FEW else 0
    if not workers:
        return iter(track(map(function, items), description=description, total=len(items), quiet=quiet))

    import torch
    from torch.utils.data import DataLoader

    # A generator of its own: a loader draws a seed, and from the global one a run that fills the cache would begin with
    # other weights than one that finds it filled.
    chunk = max(1, min(CHUNK, len(items) // (4 * workers)))
    each: Any = _Each(function, items)
    loader: DataLoader[Any] = DataLoader(
        each, chunk, num_workers=workers, collate_fn=_as_list, generator=torch.Generator()
    )
    everything = (result for results in loader for result in results)
    return iter(track(everything, description=description, total=len(items), quiet=quiet))


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_freed_memory() -> None:
    """Lets this process reuse the memory that it frees, where the C library is glibc.

    It would return what a batch of images took, and the kernel would clear every page of the next one again: about 600
    page faults an image of pre-training, 1.6 ms of CPU time. Above 32 MiB a block is returned in any case.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # of malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 32 * 2**20)


def _as_list(results: list[Result]) -> list[Result]:
    return results


class _Each(Generic[Item, Result]):
    def __init__(self, function: Callable[[Item], Result], items: Sequence[Item]) -> None:
        self.function = function
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Result:
        return self.function(self.items[index])
