"""Decides whether a run fits a machine, from its rows, its teachers and a trace of its training model."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from visper.config import Lora, Run
from visper.distillation.teachers.tasks import planned_specs
from visper.planning.fake_run import FakeRun
from visper.planning.host import host_memory
from visper.planning.levers import Lever, first_lever
from visper.planning.memory import CUDA_CONTEXT, Machine, MemoryModel
from visper.planning.parameters import starting_point
from visper.planning.row_statistics import row_statistics
from visper.planning.teachers import measure_teachers


class Fit:
    """The memory that ``run`` needs on ``machine``.

    Attributes:
        run, machine: the run and the machine it is planned on.
        specs, teachers: shapes of the targets and sizes of the teachers, by task.
        model: the run's training model on fake tensors.
        rows: the number of rows and their lengths.
        settings: the settings that determine memory, with ``gradient_checkpointing: auto`` resolved.
        memory: peak memory of one device, by what holds it.
        host: host memory, by moment.
        sent: bytes that one process sends per optimizer step; None if not known.

    Raises:
        ConfigError: a configuration cannot be found, or the rows cannot be counted.
        ValueError: a teacher cannot be loaded.
    """

    def __init__(self, run: Run, machine: Machine) -> None:
        start = starting_point(run)
        self.specs = planned_specs(run.distillation)
        self.run, self.machine = run, machine
        self.teachers, loaded = measure_teachers(run, machine.gpus > 0)

        @cache
        def model_of(lora: bool) -> FakeRun:
            settings = (run.lora or Lora.model_validate({})) if lora else None
            return FakeRun(run.model_copy(update={"lora": settings}), start, self.specs)

        self._model_of = model_of
        self.model = model_of(run.lora is not None)
        self.rows = row_statistics(run, start, self.model.student)
        # Loaded teachers are still in memory: on a CPU they are part of the training process.
        process = CUDA_CONTEXT if machine.gpus else _resident()
        self._held = MemoryModel(run, machine, self.rows, self.specs, self.teachers, process)
        del loaded
        self.settings = self._held.decided(self.model)
        self.memory = self._held.memory(self.settings, self.model)
        self.host = host_memory(self._held, self.settings, self.model)
        self.sent = self._held.sent(self.settings, self.model)

    @property
    def fits(self) -> bool:
        """True if the run fits, or if the machine's memory is not known."""
        return self.machine.usable is None or self.memory.total <= self.machine.usable

    def lever(self) -> Lever | None:
        """The first change that makes the run fit; None if it fits already or no change makes it fit."""
        return None if self.fits else first_lever(self._held, self.settings, self._model_of)


def _resident() -> float:
    """Resident bytes of this process, including its libraries."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:  # not Linux
        import resource

        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024
    return float(pages * 4096)
