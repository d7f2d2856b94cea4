"""Plans a build: which targets are missing, how they are divided into parts, and how large they are.

Images are identified by content. The images of a part depend on what is missing and never on the number of processes,
so that a build that is killed and repeated, with any number of processes, ends with the same files.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.filesize import decimal

from visper.common.cache import key
from visper.common.console import Console, announce
from visper.common.errors import ConfigError
from visper.data.checks.digests import digests_of
from visper.data.rows.records import Drop, DropList
from visper.data.rows.table import Records
from visper.target_store.fingerprint import Fingerprint
from visper.target_store.quantize import TargetCodec
from visper.target_store.store import TEACHER, TaskTargets, folder_of

PART_BYTES = 512 << 20
"""Largest part. A process computes at most one again after a kill, and has a few in memory."""
MAX_IMAGES = 4096
"""Largest number of images in a part; applies to small targets."""


@dataclass(frozen=True)
class TargetPart:
    """Images whose targets go into one file per task: the place of each (row, number in the row) and its digest."""

    tasks: tuple[str, ...]
    places: tuple[tuple[int, int], ...]
    digests: tuple[bytes, ...]

    @property
    def name(self) -> str:
        """Name of its files, which depends on the images alone."""
        return key(*self.digests)


@dataclass(frozen=True)
class BuildPlan:
    """Number of distinct images of the run, the missing parts, and bytes to write per task."""

    images: int
    parts: tuple[TargetPart, ...]
    sizes: Mapping[str, int]

    @property
    def total(self) -> int:
        """Bytes still to be written."""
        return sum(self.sizes.values())


def plan_build(
    records: Records,
    store: Path,
    made_by: Mapping[str, Fingerprint],
    codecs: Mapping[str, TargetCodec],
    quiet: bool,
    drop_limit: float,
) -> BuildPlan:
    """Compares the run's images with the store. Images that lack targets of the same tasks share parts, in row order.

    Args:
        made_by: task -> fingerprint of its teacher.
        codecs: task -> codec of its targets.
        drop_limit: largest accepted share of rows with an image file that does not exist, as in training.

    Raises:
        DataError: it is larger, for example because a disk is not mounted.
    """
    first_place: dict[bytes, tuple[int, int]] = {}
    digests = digests_of(records, quiet)
    lost = (
        Drop(records[row].id, "missing image", f"'{records[row].images[number].path}': expected a file")
        for (row, number), own in digests.items()
        if own is None
    )
    DropList(lost).check(len(records), drop_limit)
    for place, own in digests.items():
        if own is not None:
            first_place.setdefault(own, place)
    missing: dict[bytes, list[str]] = defaultdict(list)
    for task, fingerprint in made_by.items():
        folder, images = folder_of(store, fingerprint), list(first_place)
        there = (folder / TEACHER).is_file()
        for own in TaskTargets(folder, codecs[task].dtype).missing(images) if there else images:
            missing[own].append(task)
    groups: dict[tuple[str, ...], list[bytes]] = defaultdict(list)
    for own in first_place:
        if own in missing:
            groups[tuple(missing[own])].append(own)
    largest = max(codec.target_bytes for codec in codecs.values())
    each = max(1, min(MAX_IMAGES, PART_BYTES // largest))
    parts = [
        TargetPart(tasks, tuple(first_place[own] for own in some), tuple(some))
        for tasks, digests in groups.items()
        for some in (digests[start : start + each] for start in range(0, len(digests), each))
    ]
    counts = {task: sum(len(part.places) for part in parts if task in part.tasks) for task in codecs}
    return BuildPlan(
        len(first_place), tuple(parts), {task: count * codecs[task].target_bytes for task, count in counts.items()}
    )


def announce_plan(plan: BuildPlan, codecs: Mapping[str, TargetCodec], store: Path, console: Console) -> None:
    """Prints the missing images and their size per task, then the total size and the free disk space."""
    for task, codec in codecs.items():
        missing = plan.sizes[task] // codec.target_bytes
        shape = f"{codec.spec.tokens} x {codec.spec.width} {codec.dtype}, {codec.target_bytes:,} bytes per image"
        announce(
            console,
            "targets",
            f"{task}: {missing:,} of {plan.images:,} images to compute; {shape}: {_size(plan.sizes[task])}",
        )
    announce(console, "disk", f"{_size(plan.total)} to write, {_size(_free_bytes(store))} free at '{store}'")


def refuse_full_disk(plan: BuildPlan, store: Path, dtype: str) -> None:
    """Raises ConfigError if the disk cannot hold what the plan writes."""
    need, free = int(plan.total * 1.01), _free_bytes(store)  # files also have headers, digests and checksums
    if need > free:
        smaller = "" if dtype in ("int8", "fp8") else ", or --dtype int8, half the size of float16"
        raise ConfigError(
            f"the targets to be computed take {_size(need)}, but '{store}' has {_size(free)} free: "
            f"choose another disk{smaller}"
        )


def _size(count: int) -> str:
    return decimal(count, precision=2)


def _free_bytes(store: Path) -> int:
    place = store.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
