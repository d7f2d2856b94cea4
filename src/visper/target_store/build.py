"""Computes a run's targets once, for every picture, into a store (see ``distillation.store``).

Pictures are told apart by content and dealt out in parts, whose pictures depend on what is missing and never on the
number of processes. So a build that is killed at any time and repeated, with as many processes as one likes, ends with
the same files.
"""

from __future__ import annotations

import platform
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from visper.common.cache import key
from visper.common.console import announce
from visper.common.errors import ConfigError, DataError
from visper.config import Run
from visper.data.checks.digests import content_of, digest, digests_of
from visper.data.collator import Preprocess
from visper.data.images import arrange, background_of, open_image
from visper.data.rows.records import DropList
from visper.data.rows.sources import open_records
from visper.data.rows.table import Records
from visper.data.sets.catalog import row_files
from visper.distillation import TargetSpec, Teacher
from visper.distillation.teachers.tasks import build_teachers, planned_teachers, teacher_dtype
from visper.model.start import starting_processor
from visper.target_store.fingerprint import Fingerprint
from visper.target_store.open import makers
from visper.target_store.quantize import Packing
from visper.target_store.store import (
    TEACHER,
    StoredTeacher,
    TaskTargets,
    claim_store,
    folder_of,
    read_dtype,
    write_part,
)

PART_BYTES = 512 << 20
"""Of a part's largest targets: what a kill loses, and what a process holds in memory a few times."""
MOST_PICTURES = 4096
LOCK = ".lock"
DTYPE = "float16"
"""Of a new store, unless another is asked for."""


@dataclass(frozen=True)
class TargetPart:
    """Pictures whose targets go into one file a task: rows that show them, and their digests."""

    tasks: tuple[str, ...]
    rows: tuple[int, ...]
    digests: tuple[bytes, ...]

    @property
    def name(self) -> str:
        """Follows from the pictures."""
        return key(*self.digests)


@dataclass(frozen=True)
class Plan:
    """What a build would do: how many pictures, what is missing in which parts, and bytes a task."""

    pictures: int
    parts: tuple[TargetPart, ...]
    sizes: Mapping[str, int]

    @property
    def total(self) -> int:
        """Bytes still to be written."""
        return sum(self.sizes.values())


def build_targets(
    run: Run, out: Path, dtype: str | None = None, batch: int = 32, size_only: bool = False, quiet: bool = False
) -> Plan:
    """Computes what the store lacks of the run's pictures and teachers. Safe to kill and repeat.

    Args:
        run: a PT run; its data, geometry and teachers count.
        out: the store; made where it is not there.
        dtype: a key of ``packing.DTYPES``; default: the store's, float16 for a new one.
        batch: pictures that a teacher is given at once.
        size_only: say what would be computed and how large that is, and write nothing.
        quiet: print nothing.

    Raises:
        ConfigError: the run has no teachers, the store is something else, or the disk is too small.
        DataError: a source is missing, or a picture changes while it is read.
    """
    if run.distillation is None:
        raise ConfigError(f"'{run.name}' has no 'distillation', so it needs no targets: give the run of stage pt")
    row_files(run.data)
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(minutes=run.launch.timeout_minutes))
    console = Console(quiet=quiet or not state.is_main_process, soft_wrap=True)
    dtype = dtype or read_dtype(out) or DTYPE
    processor = starting_processor(run).image_processor
    fingerprint = makers(run, processor)
    for task, own in fingerprint.items():
        if own.revision is None and not size_only:
            model = run.distillation.tasks[task].teacher.model
            raise ConfigError(
                f"task '{task}': '{model}' is no folder, and the hub cannot be asked: `hf download {model}`"
            )
    packings = {task: Packing(own.spec, dtype) for task, own in planned_teachers(run.distillation).items()}
    with state.main_process_first():
        records = open_records(row_files(run.data), _agreed(run), quiet=console.quiet)
    lock = FileLock(out / LOCK)
    if state.is_main_process and not size_only:
        claim_store(out, dtype)
        _take(lock, out)
    try:
        plan = _plan(records, out, fingerprint, packings, console.quiet) if state.is_main_process else None
        plan = broadcast_object_list([plan])[0]
        assert plan is not None
        _say(plan, packings, out, console)
        if size_only:
            return plan
        if not plan.parts:
            announce(console, "targets", f"nothing to do: '{out}' holds all {plan.pictures:,} pictures of '{run.name}'")
            return plan
        _refuse_full(plan, out, dtype)
        _compute(run, records, plan, out, fingerprint, packings, background_of(processor), batch, console)
        state.wait_for_everyone()
        announce(console, "targets", f"complete: '{out}'; train with distillation.targets={out}")
        return plan
    finally:
        lock.release()


def _agreed(run: Run) -> DropList:
    return DropList(agreed=(drop for file in run.data.drop_list for drop in DropList.read(Path(file))))


def _take(lock: FileLock, out: Path) -> None:
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ConfigError(f"another process is building targets in '{out}': wait for it, or stop it") from error
    for leftover in out.rglob(".*.partial-*"):  # of a build that was killed while it wrote
        leftover.unlink()


def _plan(
    records: Records, out: Path, fingerprint: Mapping[str, Fingerprint], packings: Mapping[str, Packing], quiet: bool
) -> Plan:
    """Parts hold pictures in the order of the rows; those that lack the same tasks' targets go together."""
    first_row: dict[bytes, int] = {}
    for row, own in enumerate(digests_of(records, quiet)):
        if own is not None:
            first_row.setdefault(own, row)
    wanted = list(first_row)
    lacks: dict[bytes, list[str]] = defaultdict(list)
    for task, made in fingerprint.items():
        folder = folder_of(out, made)
        have = (
            TaskTargets(folder, packings[task].dtype).known(wanted)
            if (folder / TEACHER).is_file()
            else [False] * len(wanted)
        )
        for own, known in zip(wanted, have, strict=True):
            if not known:
                lacks[own].append(task)
    groups: dict[tuple[str, ...], list[bytes]] = defaultdict(list)
    for own in wanted:
        if own in lacks:
            groups[tuple(lacks[own])].append(own)
    largest = max(packing.target_bytes for packing in packings.values())
    each = max(1, min(MOST_PICTURES, PART_BYTES // largest))
    parts = [
        TargetPart(tasks, tuple(first_row[own] for own in some), tuple(some))
        for tasks, digests in groups.items()
        for some in (digests[start : start + each] for start in range(0, len(digests), each))
    ]
    counts = {task: sum(len(part.rows) for part in parts if task in part.tasks) for task in packings}
    sizes = {task: count * packings[task].target_bytes for task, count in counts.items()}
    return Plan(len(wanted), tuple(parts), sizes)


def _say(plan: Plan, packings: Mapping[str, Packing], out: Path, console: Console) -> None:
    for task, packing in packings.items():
        spec = packing.spec
        missing = plan.sizes[task] // packing.target_bytes
        shape = f"{spec.tokens} x {spec.width} {packing.dtype}, {packing.target_bytes:,} bytes a picture"
        announce(
            console,
            "targets",
            f"{task}: {missing:,} of {plan.pictures:,} pictures to compute; {shape}: {gb(plan.sizes[task])}",
        )
    announce(console, "disk", f"{gb(plan.total)} to write, {gb(_free(out))} free at '{out}'")


def _refuse_full(plan: Plan, out: Path, dtype: str) -> None:
    # A part lies twice on the disk for no moment, but its file has a header and digests.
    need, free = int(plan.total * 1.01), _free(out)
    if need > free:
        smaller = "" if dtype in ("int8", "fp8") else "; --dtype int8 halves float16"
        raise ConfigError(
            f"the targets still to be computed take {gb(need)}, '{out}' has {gb(free)} free: choose another "
            f"disk{smaller}"
        )


def gb(count: int) -> str:
    """Bytes for people, in powers of ten as disks are sold."""
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count / 1000:.1f} kB"


def _free(out: Path) -> int:
    place = out.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _compute(
    run: Run,
    records: Records,
    plan: Plan,
    out: Path,
    fingerprint: Mapping[str, Fingerprint],
    packings: Mapping[str, Packing],
    background: tuple[int, int, int],
    batch: int,
    console: Console,
) -> None:
    state = PartialState()
    teachers = {
        task: teacher.to(state.device)
        for task, teacher in build_teachers(run.distillation, run.optimization.precision).items()
    }
    for task, teacher in teachers.items():
        if state.is_main_process:
            _introduce(run, task, teacher, folder_of(out, fingerprint[task]), fingerprint[task], packings[task].spec)
    state.wait_for_everyone()
    mine = plan.parts[state.process_index :: state.num_processes]
    steps = [(part, start) for part in mine for start in range(0, len(part.rows), batch)]
    preprocess = {task: teacher.preprocess for task, teacher in teachers.items()}
    pictures = _Pictures(records, run.data.geometry.value, background, preprocess)
    order = [
        list(zip(part.rows, part.digests, [part.tasks] * len(part.rows), strict=True))[start : start + batch]
        for part, start in steps
    ]
    loader: DataLoader[Any] = DataLoader(
        pictures,
        batch_sampler=order,
        num_workers=min(run.data.workers, len(order)),
        collate_fn=_collate,
        pin_memory=state.device.type == "cuda",
        generator=torch.Generator(),
    )
    batches = track(loader, description="computing targets", total=len(order), console=console, disable=console.quiet)
    waiting: dict[str, list[Tensor | None]] = defaultdict(list)
    for (part, start), (readable, pixels) in zip(steps, batches, strict=True):
        for task in part.tasks:
            waiting[task] += _targets(teachers[task], pixels.get(task), readable, state.device)
        if start + batch >= len(part.rows):
            for task in part.tasks:
                write_part(folder_of(out, fingerprint[task]), packings[task], part.digests, waiting[task], part.name)
            waiting.clear()


def _introduce(
    run: Run, task: str, teacher: Teacher, folder: Path, fingerprint: Fingerprint, planned: TargetSpec
) -> None:
    """Writes who makes these targets; refuses to mix precisions."""
    assert run.distillation is not None
    precision = teacher_dtype(run.distillation, run.optimization.precision)
    if teacher.spec != planned:
        raise ConfigError(f"task '{task}': the teacher gives {teacher.spec}, its configuration says {planned}")
    if (folder / TEACHER).is_file():
        begun = StoredTeacher.read(folder).precision
        if begun != precision:
            raise ConfigError(
                f"task '{task}': the targets in '{folder}' were begun in {begun}, the teacher is now in {precision}: "
                f"set distillation.teacher_dtype={begun}, or name another store"
            )
        return
    versions = {name: version(name) for name in ("visper-lm", "torch", "transformers", "pillow")}
    versions["python"] = platform.python_version()
    model = run.distillation.tasks[task].teacher.model
    StoredTeacher(fingerprint, teacher.spec, precision, model, versions).write(folder)


def _targets(
    teacher: Teacher, pixels: Tensor | None, readable: Sequence[bool], device: torch.device
) -> Iterator[Tensor | None]:
    """A target on the CPU for every picture that could be decoded, None for the others, in order."""
    found = iter(()) if pixels is None else iter(teacher(pixels.to(device, non_blocking=True)).cpu())
    return (next(found) if good else None for good in readable)


class _Pictures(Dataset[Any]):
    """(row, digest, tasks) -> what each teacher is given, None where the picture cannot be decoded."""

    def __init__(
        self, records: Records, geometry: str, background: tuple[int, int, int], preprocess: Mapping[str, Preprocess]
    ) -> None:
        self.records = records
        self.geometry = geometry
        self.background = background
        self.preprocess = dict(preprocess)

    def __getitem__(self, item: tuple[int, bytes, Sequence[str]]) -> dict[str, Tensor] | None:
        row, own, tasks = item
        content = content_of(self.records, row)
        name = self.records[row].image or ""
        if content is None or digest(content) != own:
            raise DataError("changing picture", f"'{name}' was changed or removed meanwhile: repeat the command")
        try:
            picture: Image.Image = arrange(open_image(name, content), self.geometry, self.background)
        except DataError:
            return None
        return {task: self.preprocess[task](picture) for task in tasks}


def _collate(items: Sequence[dict[str, Tensor] | None]) -> tuple[list[bool], dict[str, Tensor]]:
    good = [item for item in items if item is not None]
    stacked = {task: torch.stack([item[task] for item in good]) for task in (good[0] if good else ())}
    return [item is not None for item in items], stacked
