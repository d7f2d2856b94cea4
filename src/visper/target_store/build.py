"""Computes a run's targets into a store. A build can be killed and repeated, with any number of processes."""

from __future__ import annotations

import platform
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from visper.common.console import Console, announce, track
from visper.common.errors import ConfigError, DataError
from visper.common.files import remove_leftovers
from visper.common.lock import locked_by_first
from visper.common.parallel import end_with_parent
from visper.common.ranks import first_decides, first_goes_first, require_gpu_each, require_nccl, wait_for_all
from visper.config import Data, Distillation, Run
from visper.config.data import MOST_PIXELS
from visper.data.checks.digests import contents_of, digest
from visper.data.collator import Preprocess
from visper.data.images import arrange, background_of, open_image, rgb_bytes, stacked
from visper.data.rows.records import DropList
from visper.data.rows.sources import open_records
from visper.data.rows.table import Records
from visper.data.sets.catalog import row_files
from visper.distillation import Teacher
from visper.distillation.teachers.tasks import build_teachers, planned_specs, teacher_dtype
from visper.model.start import starting_processor
from visper.target_store.fingerprint import Fingerprint, fingerprints
from visper.target_store.plan import BuildPlan, TargetPart, announce_plan, plan_build, refuse_full_disk
from visper.target_store.quantize import TargetCodec
from visper.target_store.store import StoredTeacher, claim_store, folder_of, read_dtype, write_part

DEFAULT_DTYPE = "float16"


def build_targets(
    run: Run, out: Path, dtype: str | None = None, batch: int = 32, size_only: bool = False, quiet: bool = False
) -> BuildPlan:
    """Computes the targets that the store lacks for the run's images and teachers.

    Args:
        out: the store's folder; created if it does not exist.
        dtype: a key of ``quantize.DTYPES``; default: the store's, float16 for a new one.
        batch: images per forward pass of a teacher.
        size_only: print what would be computed and how large it is, and write nothing.

    Raises:
        ConfigError: the run has no teachers, ``out`` is not a store, or the disk is too small.
        DataError: a source is missing, or an image changes while it is read.
    """
    if run.distillation is None or not run.distillation.taught:
        raise ConfigError(f"no task of '{run.name}' has a teacher, so there is nothing to store: choose a run with one")
    row_files(run.data)  # missing sources are an error before anything is loaded
    require_nccl()
    require_gpu_each()
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(minutes=run.launch.timeout_minutes))
    console = Console(quiet=quiet or not state.is_main_process, soft_wrap=True)
    dtype = dtype or read_dtype(out) or DEFAULT_DTYPE
    background = background_of(starting_processor(run).image_processor)
    made_by = fingerprints(run.distillation.tasks, run.data.geometry.value, background)
    codecs = {task: TargetCodec(spec, dtype) for task, spec in planned_specs(run.distillation).items()}
    records = _open_rows(run.data, console.quiet)

    def shared_plan() -> BuildPlan:
        """The plan, made and printed by the first process and shared with all."""
        plan = first_decides(lambda: plan_build(records, out, made_by, codecs, console.quiet, run.data.drop_limit))
        announce_plan(plan, codecs, out, console)
        return plan

    if size_only:
        return shared_plan()
    _require_revisions(made_by, run.distillation)
    with _locked(out, dtype, state, console):
        plan = shared_plan()
        if not plan.parts:
            announce(console, "targets", f"nothing to do: '{out}' holds all {plan.images:,} images of '{run.name}'")
            return plan
        refuse_full_disk(plan, out, dtype)
        outputs = _open_outputs(run.distillation, run.optimization.precision, out, made_by, codecs, state)
        preprocess = {task: output.teacher.preprocess for task, output in outputs.items()}
        images = _Images(records, run.data.geometry.value, background, preprocess)
        mine = plan.parts[state.process_index :: state.num_processes]
        _compute(mine, images, outputs, batch, run.data.workers, state.device, console)
        wait_for_all()
        announce(console, "targets", f"complete: '{out}'; train with distillation.targets={out}")
        return plan


def _open_rows(data: Data, quiet: bool) -> Records:
    agreed = (drop for file in data.drop_list for drop in DropList.read(Path(file)))
    with first_goes_first():  # the others read its cache
        return open_records(row_files(data), DropList(agreed=agreed), quiet=quiet)


def _require_revisions(made_by: Mapping[str, Fingerprint], distillation: Distillation) -> None:
    for task, fingerprint in made_by.items():
        if fingerprint.revision is None:
            model = distillation.tasks[task].target.place
            raise ConfigError(
                f"task '{task}': '{model}' is not a folder, and its commit cannot be read from the hub: "
                f"run `hf download {model}` first"
            )


@contextmanager
def _locked(out: Path, dtype: str, state: PartialState, console: Console) -> Iterator[None]:
    """Locks the store, claims it in the first process, and removes the leftovers of a killed build."""
    with locked_by_first(out, console):
        first_decides(lambda: claim_store(out, dtype))
        if state.is_main_process:
            remove_leftovers(out.rglob(".*"))
        yield


@dataclass(frozen=True)
class _Output:
    """One task's teacher, the folder for its targets, and how they are encoded."""

    teacher: Teacher
    folder: Path
    codec: TargetCodec


def _open_outputs(
    distillation: Distillation,
    precision: str,
    out: Path,
    made_by: Mapping[str, Fingerprint],
    codecs: Mapping[str, TargetCodec],
    state: PartialState,
) -> dict[str, _Output]:
    """Loads the teachers and writes their ``teacher.json``; refuses to mix precisions in one folder."""
    outputs = {}
    for task, teacher in build_teachers(distillation, precision, device=state.device).items():
        folder, spec = folder_of(out, made_by[task]), codecs[task].spec
        if teacher.spec != spec:
            raise ConfigError(
                f"task '{task}': the teacher has targets {teacher.spec}, but its configuration says {spec}"
            )
        outputs[task] = _Output(teacher, folder, codecs[task])
        described = StoredTeacher(
            made_by[task],
            spec,
            teacher_dtype(distillation, precision),
            distillation.tasks[task].target.place,
            {name: version(name) for name in ("visper-lm", "torch", "transformers", "pillow")}
            | {"python": platform.python_version()},
        )
        first_decides(partial(_describe, task, folder, described))
    return outputs


def _describe(task: str, folder: Path, teacher: StoredTeacher) -> None:
    if not any(folder.glob("*.safetensors")):
        teacher.write(folder)
        return
    begun = StoredTeacher.read(folder).precision
    if begun != teacher.precision:
        raise ConfigError(
            f"task '{task}': the targets in '{folder}' were computed in {begun}, but the teacher now runs in "
            f"{teacher.precision}: set distillation.teacher_dtype={begun}, or choose another store"
        )


def _compute(
    parts: Sequence[TargetPart],
    images: _Images,
    outputs: Mapping[str, _Output],
    batch: int,
    workers: int,
    device: torch.device,
    console: Console,
) -> None:
    """Reads the images of each part in batches and computes their targets; a thread writes finished parts."""
    steps = [(part, start) for part in parts for start in range(0, len(part.places), batch)]
    order = [
        [(place, own, part.tasks) for place, own in zip(part.places, part.digests, strict=True)][start : start + batch]
        for part, start in steps
    ]
    loader: DataLoader[Any] = DataLoader(
        images,
        batch_sampler=order,
        num_workers=min(workers, len(order)),
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=end_with_parent,
        generator=torch.Generator(),
    )
    batches = track(loader, description="computing targets", total=len(order), console=console, quiet=console.quiet)
    computed: dict[str, list[Tensor | None]] = defaultdict(list)
    written: list[Future[None]] = []
    with ThreadPoolExecutor(1) as writer:
        for (part, start), (readable, pixels) in zip(steps, batches, strict=True):
            for task in part.tasks:
                computed[task] += _targets(outputs[task], pixels.get(task), readable, device)
            if start + batch >= len(part.places):
                for write in written:  # at most one part is pending, and an error ends the build
                    write.result()
                written = [
                    writer.submit(
                        write_part,
                        outputs[task].folder,
                        outputs[task].codec,
                        part.digests,
                        computed.pop(task),
                        part.name,
                    )
                    for task in part.tasks
                ]
        for write in written:
            write.result()


def _targets(
    output: _Output, pixels: Tensor | None, readable: Sequence[bool], device: torch.device
) -> Iterator[Tensor | None]:
    """A packed target on the CPU for every image that could be decoded, None for the others, in order."""
    found: Iterator[Tensor] = iter(())
    if pixels is not None:  # packed on the device, so that only the stored bytes are copied
        found = iter(output.codec.pack(output.teacher(pixels.to(device, non_blocking=True))))
    return (next(found) if good else None for good in readable)


@dataclass(frozen=True)
class _Images(Dataset[Any]):
    """((row, number in the row), digest, tasks) -> task -> its teacher's input ``[3, h, w]``; None if not decodable."""

    records: Records
    geometry: str
    background: tuple[int, int, int]
    preprocess: Mapping[str, Preprocess]

    def __getitem__(self, item: tuple[tuple[int, int], bytes, Sequence[str]]) -> dict[str, Tensor] | None:
        (row, number), own, tasks = item
        content = contents_of(self.records, row)[number]
        name = self.records[row].images[number].path
        if content is None or digest(content) != own:
            raise DataError("changing image", f"'{name}' was changed or removed during the build: repeat the command")
        try:
            image = rgb_bytes(
                arrange(open_image(name, content, max_pixels=MOST_PIXELS), self.geometry, self.background)
            )
        except DataError:
            return None
        return {task: self.preprocess[task](image) for task in tasks}


def _collate(items: Sequence[dict[str, Tensor] | None]) -> tuple[list[bool], dict[str, Tensor]]:
    good = [item for item in items if item is not None]
    batch = {task: stacked([item[task] for item in good]) for task in (good[0] if good else ())}
    return [item is not None for item in items], batch
