"""Peak memory of one device (on a CPU: of the training process), by what holds it.

The memory of a step in one process is traced (``fake_run``); how the engines shard it is arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from visper.config import Engine, Run
from visper.distillation import TargetSpec
from visper.planning.fake_run import FakeRun
from visper.planning.row_statistics import Rows
from visper.planning.teachers import TeacherSize

CUDA_CONTEXT = 700e6
"""Bytes of the driver and its libraries on each GPU. Assumed."""
CPU_CACHES = 0.10
"""Memory of a CPU process beyond live tensors (allocator fragmentation, kernel buffers), as a share of them. Fitted to
four runs of an earlier planner and used for every run; details in ``benchmarks/results/plan_memory.md``."""
USABLE = 0.95
"""Share of a GPU's nominal memory that a plan may fill, because of the allocator's fragmentation."""
SHARES = tuple(tenths / 10 for tenths in range(11))
"""Shares of the layers that ``gradient_checkpointing: auto`` chooses from."""
SHARDED_WEIGHTS = (Engine.FSDP, Engine.ZERO3)
ZERO_BUFFER = 5e8 * 4
"""Bytes of DeepSpeed's gradient bucket: its ``reduce_bucket_size`` in float32."""


@dataclass(frozen=True)
class Machine:
    """The machine a run is planned on.

    Attributes:
        gpus: the number of GPUs on all nodes; 0: the CPU.
        memory: bytes of one device; None if unknown.
        peak: FLOPs per second of one device; None if unknown.
        per_node: GPUs per node, at most.
    """

    gpus: int
    memory: float | None
    peak: float | None = None
    per_node: int = 8

    @property
    def processes(self) -> int:
        """The number of training processes."""
        return max(1, self.gpus)

    @property
    def usable(self) -> float | None:
        """Bytes of one device that a plan may fill."""
        return None if self.memory is None else USABLE * self.memory


@dataclass(frozen=True)
class Settings:
    """The settings that determine memory. ``checkpointing``: share of the layers whose activations are recomputed."""

    micro_batch: int
    checkpointing: float
    engine: Engine
    stored_targets: bool
    lora: bool

    @classmethod
    def of(cls, run: Run) -> Settings:
        """The settings of ``run``."""
        opt, lora = run.optimization, run.lora is not None
        stored = run.distillation is not None and run.distillation.targets is not None
        return cls(opt.micro_batch, opt.recomputation, run.launch.engine, stored, lora)


@dataclass(frozen=True)
class Memory:
    """Bytes by what holds them."""

    parts: Mapping[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """The sum of the parts."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class MemoryModel:
    """Calculates the memory of a run on one machine for any ``Settings``.

    Attributes:
        specs, teachers: shapes of the targets and sizes of the teachers, by task.
        process: bytes of a process before it holds a model.
        model_of: returns the run's training model, with LoRA if True.
    """

    run: Run
    machine: Machine
    rows: Rows
    specs: Mapping[str, TargetSpec]
    teachers: Mapping[str, TeacherSize]
    process: float
    model_of: Callable[[bool], FakeRun]

    def decided(self) -> Settings:
        """The run's settings, with ``gradient_checkpointing: auto`` resolved to the smallest share that fits.

        That is 0 on a CPU, and 1 if no share fits or the memory is not known.
        """
        settings = Settings.of(self.run)
        if self.run.optimization.gradient_checkpointing != "auto":
            return settings
        if not self.machine.gpus:
            return replace(settings, checkpointing=0.0)
        limit = self.machine.usable or 0.0
        tried = (replace(settings, checkpointing=share) for share in SHARES)
        return next((other for other in tried if self.memory(other).total <= limit), settings)

    def memory(self, settings: Settings) -> Memory:
        """Peak memory with ``settings``."""
        model = self.model_of(settings.lora)
        held, ways = self.standing(settings), self.ways(settings)
        accumulates = self.run.optimization.global_batch > settings.micro_batch * self.machine.processes or ways > 1
        step = model.activations(self.rows, settings.micro_batch, settings.checkpointing, accumulates)
        teaching = max((teacher.activations for teacher in self.teachers.values()), default=0.0)
        share = settings.micro_batch / self.run.optimization.micro_batch * max(1, self.rows.longest.images)
        teaching *= 0.0 if settings.stored_targets else share
        # Teachers run before the step, when the gradients of the previous step are freed.
        if teaching > step + held["gradients"]:
            held |= {"gradients": 0.0, "teachers' activations": teaching}
        else:
            held["activations"] = step
        if not self.machine.gpus:
            held["allocator, kernels (assumed)"] = CPU_CACHES * sum(held.values())
        return Memory({name: size for name, size in held.items() if size})

    def standing(self, settings: Settings) -> dict[str, float]:
        """Bytes by part, without the activations of the student and its teachers."""
        model = self.model_of(settings.lora)
        engine, ways, gpus = settings.engine, self.ways(settings), self.machine.gpus
        sharded = engine in SHARDED_WEIGHTS
        held = {"CUDA context" if gpus else "process": self.process}
        held["weights"] = model.weights / (ways if sharded else 1)
        if sharded:
            half = self.run.optimization.precision == "bfloat16"
            held["gathered layers"] = 2.0 * model.layer_parameters * (2 if half else 4)
            held["gathered, all else"] = model.weights - model.layers
        held["optimizer"] = model.moments / ways
        if not gpus:
            held["copy of a checkpoint that is being written"] = model.saved + model.moments
        if engine in (Engine.ZERO2, Engine.ZERO3) and ways > 1:
            # DeepSpeed's optimizer updates a flat copy, and gradients are gathered in a buffer of fixed size.
            held["DeepSpeed's copy and buffer"] = model.gradients / ways + ZERO_BUFFER
        if not settings.stored_targets:
            held["teachers"] = sum(teacher.weights for teacher in self.teachers.values())
        floats = sum(spec.tokens * spec.width for spec in self.specs.values())
        pool = self.run.optimization.global_batch * self.rows.images * floats * 4
        held["targets"] = pool * (2 if gpus > 1 else 1)  # gathering holds both the parts and the pool
        buckets = model.gradients if gpus > 1 and engine is Engine.DDP else 0.0
        held["gradients"] = model.gradients / ways + buckets
        if engine is Engine.FSDP and self._micro_batches(settings) > 1:  # sums reduced at the end of the step
            once, copies = self.run.launch.reduce_once, self.run.launch.replicas > 1
            held["gradients of the step"] = model.gradients if once else model.gradients / ways if copies else 0.0
        return held

    def sent(self, settings: Settings) -> float | None:
        """Bytes that one process sends per optimizer step by ring collectives, without gathered targets.

        None for DeepSpeed's engines. FSDP gathers layers in the forward and in the backward pass, and everything else
        once.
        """
        model = self.model_of(settings.lora)
        engine, ways, launch = settings.engine, self.ways(settings), self.run.launch
        if engine in (Engine.ZERO2, Engine.ZERO3):
            return None
        if engine is Engine.DDP:
            return 2.0 * model.gradients * (1 - 1 / self.machine.processes)
        width = 2 if self.run.optimization.precision == "bfloat16" else 4
        weights = width * (sum(part.total for part in model.parts) + model.layer_parameters * model.num_layers)
        micro_batches = self._micro_batches(settings)
        within = micro_batches * weights + (1 if launch.reduce_once else micro_batches) * model.gradients
        return within * (1 - 1 / ways) + 2.0 * model.gradients / ways * (1 - 1 / launch.replicas)

    def _micro_batches(self, settings: Settings) -> int:
        return max(1, self.run.optimization.global_batch // (settings.micro_batch * self.machine.processes))

    def ways(self, settings: Settings) -> int:
        """The number of shards that the model is split into."""
        if settings.engine is Engine.DDP:
            return 1
        replicas = self.run.launch.replicas if settings.engine is Engine.FSDP else 1
        return max(1, self.machine.processes // replicas)
