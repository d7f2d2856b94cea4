"""Host memory of a run on GPUs: while it starts or resumes, and while a checkpoint is written.

Calculated from what ``training.run`` and ``training.checkpoint_writer`` do. Weights pass through host memory once, on
their way to the GPUs. A resumed run reads them like a new one; then each process reads its shards of the checkpoint,
tensor by tensor. The memory of the data loader's processes is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from visper.config import Engine
from visper.planning.memory import MemoryModel, Settings

LIBRARIES = 0.7e9
"""Bytes of a process before it reads a model. Assumed; 0.6e9 was measured on CPUs."""


@dataclass(frozen=True)
class HostMemory:
    """Bytes of host memory at one moment, of the ``first`` process and of any ``other``; ``processes`` per node."""

    first: float
    other: float
    processes: int

    @property
    def node(self) -> float:
        """Bytes of the node that runs the first process, which is the largest of all nodes."""
        return self.first + (self.processes - 1) * self.other


def host_memory(memory: MemoryModel, settings: Settings) -> dict[str, HostMemory]:
    """Host memory by moment; empty on a CPU, where ``memory`` already is host memory."""
    machine, engine, model = memory.machine, settings.engine, memory.model_of(settings.lora)
    if not machine.gpus:
        return {}
    teachers = 0.0 if settings.stored_targets else sum(teacher.weights for teacher in memory.teachers.values())
    shares = engine is Engine.FSDP and machine.gpus > 1  # only the first process reads the weights
    starting = teachers + model.read, teachers + (0.0 if shares else model.read)
    if engine in (Engine.ZERO2, Engine.ZERO3) and machine.gpus > 1:  # DeepSpeed writes its shards from the GPU
        writing = 2 * model.saved, 0.0  # the gathered weights and their copy
    else:
        writing = ((model.saved + model.moments) / memory.ways(settings),) * 2
    processes = min(machine.gpus, machine.per_node)
    return {
        moment: HostMemory(LIBRARIES + first, LIBRARIES + other, processes)
        for moment, (first, other) in (("start or resume", starting), ("a checkpoint is written", writing))
    }
