"""The plan of a run on a machine, made without loading weights: parameters, memory, FLOPs, time, disk.

A step is traced on fake tensors (``fake_run``); the rest is arithmetic on configurations. The plan names its
assumptions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from visper.config import Engine, Run
from visper.data.sets.catalog import with_needs
from visper.distillation import TargetSpec
from visper.planning.fake_run import FakeRun
from visper.planning.fit import Fit
from visper.planning.host import HostMemory
from visper.planning.levers import Lever
from visper.planning.memory import Machine, Memory, Settings
from visper.planning.row_statistics import Rows
from visper.training.stages import PartCount

ASSUMED_MFU = 0.4
"""Share of a GPU's peak FLOPs that a run reaches. Assumed: 0.35 to 0.5 is usual for models of this size."""


@dataclass(frozen=True)
class Plan:
    """The plan of one run on one machine.

    Attributes:
        run, machine: the run and the machine it is planned on.
        settings: the settings that determine memory, with ``gradient_checkpointing: auto`` resolved.
        parts: parameter counts by part, all and trainable.
        rows: the number of rows and their lengths.
        memory: peak memory of one device, by what holds it.
        host: host memory by moment; empty on a CPU, where ``memory`` already is host memory.
        lever: the first change that makes the run fit; None if it fits already or no change makes it fit.
        row_flops, teacher_flops: model FLOPs of an average row (one forward and one backward pass), and its teachers'.
        sent: bytes that one process sends per optimizer step; None if not known.
        disk: bytes by what is stored.
    """

    run: Run
    machine: Machine
    settings: Settings
    parts: list[PartCount]
    rows: Rows
    memory: Memory
    host: Mapping[str, HostMemory]
    lever: Lever | None
    row_flops: float
    teacher_flops: float
    sent: float | None
    disk: Mapping[str, float]

    @property
    def fits(self) -> bool:
        """True if the run fits, or if the machine's memory is not known."""
        return self.machine.usable is None or self.memory.total <= self.machine.usable

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        opt = self.run.optimization
        steps = -(-self.rows.count * opt.epochs // opt.global_batch)
        return int(min(steps, opt.max_steps) if opt.max_steps else steps)

    @property
    def step_flops(self) -> float:
        """FLOPs of one optimizer step, including teachers, without recomputation."""
        return (self.row_flops + self.teacher_flops) * self.run.optimization.global_batch

    @property
    def seconds(self) -> float | None:
        """Duration of the run at ``ASSUMED_MFU``; None if the device's peak is not known."""
        if self.machine.peak is None:
            return None
        recomputed = self.row_flops * self.settings.checkpointing / 3
        total = (self.step_flops + recomputed * self.run.optimization.global_batch) * self.steps
        return total / (self.machine.peak * ASSUMED_MFU * self.machine.processes)


def plan(run: Run, machine: Machine) -> Plan:
    """Plans ``run`` on ``machine``. If it does not fit, alternatives are tried until one does.

    Raises:
        ConfigError: a configuration cannot be found, or the rows cannot be counted.
    """
    fit = Fit(run, machine)
    model, rows = fit.model, fit.rows
    teacher_flops = rows.images * sum(teacher.flops for teacher in fit.teachers.values())
    return Plan(
        run,
        machine,
        fit.settings,
        model.parts,
        rows,
        fit.memory,
        fit.host,
        fit.lever(),
        model.row_flops(rows),
        teacher_flops,
        fit.sent,
        _disk(run, rows, fit.specs, model),
    )


def _disk(run: Run, rows: Rows, specs: Mapping[str, TargetSpec], model: FakeRun) -> dict[str, float]:
    disk: dict[str, float] = {}
    sets = [part for source in run.data.sources if source.data_set for part, _ in with_needs(source.data_set)]
    sizes = [download.estimate for part in sets for download in part.downloads]
    if sets:
        known = float(sum(size or 0 for size in sizes))
        least = ", at least (some sizes are not published)" if None in sizes else ""
        disk[f"data, archives{least}"] = disk[f"data, unpacked, about{least}"] = known
    floats = sum(spec.tokens * spec.width for spec in specs.values())
    if floats:
        disk["targets, if stored in fp16"] = rows.count * rows.images * floats * 2
    weights, moments = model.saved, model.moments
    if run.launch.engine is Engine.ZERO2:  # adds the module's weights and the optimizer's float32 copy
        weights *= 3
    elif run.launch.engine is Engine.ZERO3:
        weights *= 2
    disk["a checkpoint, trainable weights"], disk["a checkpoint, optimizer"] = weights, moments
    kept = run.logging.keep_checkpoints + 1 + (run.evaluation is not None)
    disk[f"checkpoints ({kept} at once)"] = kept * (weights + moments)
    skipped = {"task_tokens", "predictors", "logit_scales", "lora"}
    total = sum(part.total for part in model.parts if part.part not in skipped)
    disk["finished model"] = total * (2.0 if run.optimization.precision == "bfloat16" else 4.0)
    return disk
