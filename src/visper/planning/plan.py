"""What a run will need on a machine, before anything is loaded: parameters, memory, FLOPs, time, disk.

Steps are run without values (``fake_run``); the rest is arithmetic on configurations, and what is assumed is said in
the plan.
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
"""Share of a GPU's peak that a run reaches. Assumed: 0.35 to 0.5 is usual for models of this size."""


@dataclass(frozen=True)
class Plan:
    """The answer for one run and machine.

    Attributes:
        run, machine: what was asked about.
        settings: those of the run that decide memory, ``gradient_checkpointing: auto`` decided.
        parts: parameters by part, all and trainable.
        rows: how many rows, how long.
        memory: of one device, by what holds it.
        host: host memory by moment; nothing on a CPU, where ``memory`` is the host's.
        lever: the first change that makes it fit; None where the run fits, or nothing makes it.
        row_flops, teacher_flops: model FLOPs of an average row (forward and backward once), and its teachers'.
        sent: bytes that one process sends in an optimizer step; None where that is not known.
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
        """Whether the memory is enough, as far as it is known."""
        return self.machine.usable is None or self.memory.total <= self.machine.usable

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        opt = self.run.optimization
        steps = -(-self.rows.count * opt.epochs // opt.global_batch)
        return int(min(steps, opt.max_steps) if opt.max_steps else steps)

    @property
    def step_flops(self) -> float:
        """FLOPs of one optimizer step, teachers included, nothing recomputed."""
        return (self.row_flops + self.teacher_flops) * self.run.optimization.global_batch

    @property
    def seconds(self) -> float | None:
        """Of the run as it stands at ``ASSUMED_MFU``; None where the device's peak is not known."""
        if self.machine.peak is None:
            return None
        recomputed = self.row_flops * self.settings.checkpointing / 3
        total = (self.step_flops + recomputed * self.run.optimization.global_batch) * self.steps
        return total / (self.machine.peak * ASSUMED_MFU * self.machine.processes)


def plan(run: Run, machine: Machine) -> Plan:
    """Plans ``run`` on ``machine``. Where it does not fit, the alternatives are tried until one does.

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
    if run.launch.engine is Engine.ZERO2:  # the module's weights and the optimizer's float32 copy of them
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
