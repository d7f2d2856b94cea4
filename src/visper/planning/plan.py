"""The plan of a run on a machine, made without loading weights: parameters, memory, FLOPs, time, disk.

A step is traced on fake tensors (``fake_run``); the rest is arithmetic on configurations. The plan names its
assumptions.
"""

from __future__ import annotations

import math
from functools import cache, cached_property
from pathlib import Path

from visper.config import Engine, Lora, Run
from visper.data.sets.catalog import with_needs
from visper.distillation.teachers.tasks import planned_specs
from visper.planning.fake_run import FakeRun
from visper.planning.host import host_memory
from visper.planning.levers import Lever, first_lever
from visper.planning.memory import CUDA_CONTEXT, Machine, MemoryModel
from visper.planning.parameters import starting_point
from visper.planning.row_statistics import row_statistics
from visper.planning.teachers import measure_teachers
from visper.training.arguments import check_split
from visper.training.parallel.fsdp import check_replicas

ASSUMED_MFU = 0.4
"""Share of a GPU's peak FLOPs that a run reaches. Assumed: 0.35 to 0.5 is usual for models of this size."""


class Plan:
    """The plan of ``run`` on ``machine``. What a property calculates is not needed to know whether the run fits.

    Attributes:
        model: the run's training model on fake tensors.
        parts: parameter counts by part, all and trainable.
        rows: the number of rows and their lengths.
        specs, teachers: shapes of the targets and sizes of the teachers, by task.
        settings: the settings that determine memory, with ``gradient_checkpointing: auto`` resolved.
        memory: peak memory of one device, by what holds it.
        host: host memory by moment; empty on a CPU, where ``memory`` already is host memory.
        sent: bytes that one process sends per optimizer step; None if not known.

    Raises:
        ConfigError: the global batch cannot be split over the machine's processes, a configuration cannot be found, or
            the rows cannot be counted.
        ValueError: a teacher cannot be loaded.
    """

    def __init__(self, run: Run, machine: Machine) -> None:
        check_split(run.optimization, machine.processes)
        check_replicas(run.launch.replicas, machine.processes)
        start = starting_point(run)
        self.run, self.machine = run, machine
        self.specs = planned_specs(run.distillation)
        self.teachers, loaded = measure_teachers(run, machine.gpus > 0)

        @cache
        def model_of(lora: bool) -> FakeRun:
            settings = (run.lora or Lora.model_validate({})) if lora else None
            return FakeRun(run.model_copy(update={"lora": settings}), start, self.specs)

        self.model = model_of(run.lora is not None)
        self.parts = self.model.parts
        self.rows = row_statistics(run, start, self.model.student)
        # Loaded teachers are still in memory: on a CPU they are part of the training process.
        process = CUDA_CONTEXT if machine.gpus else _resident()
        self._held = MemoryModel(run, machine, self.rows, self.specs, self.teachers, process, model_of)
        del loaded
        self.settings = self._held.decided()
        self.memory = self._held.memory(self.settings)
        self.host = host_memory(self._held, self.settings)
        self.sent = self._held.sent(self.settings)

    @property
    def fits(self) -> bool:
        """True if the run fits, or if the machine's memory is not known."""
        return self.machine.usable is None or self.memory.total <= self.machine.usable

    @cached_property
    def lever(self) -> Lever | None:
        """The first change that makes the run fit; None if it fits already or no change makes it fit."""
        return None if self.fits else first_lever(self._held, self.settings)

    @property
    def steps(self) -> int:
        """Optimizer steps of the run. The last batch of an epoch is filled with rows from the epoch's start."""
        opt = self.run.optimization
        return opt.max_steps or math.ceil(opt.epochs * math.ceil(self.rows.count / opt.global_batch))

    @cached_property
    def row_flops(self) -> float:
        """Model FLOPs of an average row: one forward and one backward pass, without teachers."""
        return self.model.row_flops(self.rows)

    @property
    def teacher_flops(self) -> float:
        """FLOPs of the teachers for an average row."""
        return self.rows.images * sum(teacher.flops for teacher in self.teachers.values())

    @property
    def step_flops(self) -> float:
        """FLOPs of one optimizer step, including teachers, without recomputation."""
        return (self.row_flops + self.teacher_flops) * self.run.optimization.global_batch

    @property
    def seconds(self) -> float | None:
        """Duration of the run at ``ASSUMED_MFU``; None if the device's peak is not known."""
        if self.machine.peak is None:
            return None
        recomputed = self.model.recomputed_flops(self.rows) * self.settings.checkpointing
        total = (self.step_flops + recomputed * self.run.optimization.global_batch) * self.steps
        return total / (self.machine.peak * ASSUMED_MFU * self.machine.processes)

    @property
    def disk(self) -> dict[str, float]:
        """Bytes by what is stored."""
        run, model, rows = self.run, self.model, self.rows
        disk: dict[str, float] = {}
        sets = [part for source in run.data.sources if source.data_set for part, _ in with_needs(source.data_set)]
        sizes = [download.estimate for part in sets for download in part.downloads]
        if sets:
            known = float(sum(size or 0 for size in sizes))
            least = ", at least (some sizes are not published)" if None in sizes else ""
            disk[f"data, archives{least}"] = disk[f"data, unpacked, about{least}"] = known
        floats = sum(spec.tokens * spec.width for spec in self.specs.values())
        if floats:
            disk["targets, if stored as float16"] = rows.count * rows.images * floats * 2
        weights, moments = model.saved, model.moments
        if run.launch.engine is Engine.ZERO2:  # adds the module's weights and the optimizer's float32 copy
            weights *= 3
        elif run.launch.engine is Engine.ZERO3:
            weights *= 2
        disk["a checkpoint, trainable weights"], disk["a checkpoint, optimizer"] = weights, moments
        kept = run.logging.keep_checkpoints + 1 + (run.evaluation is not None)
        disk[f"checkpoints ({kept} at once)"] = kept * (weights + moments)
        skipped = {"task_tokens", "predictors", "logit_scales", "lora"}
        total = sum(part.total for part in self.parts if part.part not in skipped)
        disk["finished model"] = total * (2.0 if run.optimization.precision == "bfloat16" else 4.0)
        return disk


def _resident() -> float:
    """Resident bytes of this process, including its libraries."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return float(pages * 4096)
