"""What a run will need, before anything is loaded: parameters, memory, operations, time, money, disk.

The step itself is traced without values (``trace``); the rest is arithmetic on configurations. What is assumed is said
in the plan. A CPU's figure is the memory of the whole process, a GPU's that of one device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import AutoConfig, LlavaForConditionalGeneration

from visper.common.errors import ConfigError
from visper.config import Engine, Lora, Run, Stage
from visper.data.sets.catalog import with_needs
from visper.distillation import TargetSpec, Teacher, build_teacher
from visper.distillation.teachers.tasks import DTYPES, PlannedTeacher, planned_teachers
from visper.model import Student, build_skeleton
from visper.model.hub import sizes_of
from visper.planning.parameters import first_stage
from visper.planning.row_statistics import Rows, rows_of
from visper.planning.trace import StepShape, Traced, trace_forward, trace_step, without_values
from visper.training.assemble import build_training_model, set_trainable
from visper.training.lora import add_updates
from visper.training.module import TrainingModel
from visper.training.stages import PartCount, count_parts

ASSUMED_MFU = 0.4
"""Share of a GPU's peak that a run reaches. Assumed: 0.35 to 0.5 is usual for models of this size."""
CUDA_CONTEXT = 700e6
"""Bytes of the driver and its libraries on each GPU. Assumed."""
CPU_CACHES = 0.10
"""What a CPU process keeps beyond what is alive (the allocator's holes, kernels' buffers). One figure for every
run, from ``benchmarks/results/plan_memory.md``."""
USABLE = 0.95
"""Share of a GPU's nominal memory that a plan may fill: the allocator leaves holes."""
ADAM = 8
"""Bytes of AdamW's two float32 moments a learning parameter."""
SHARDED_WEIGHTS = (Engine.FSDP, Engine.ZERO3)
ZERO_BUFFER = 5e8 * 4
"""Bytes that DeepSpeed gathers gradients in: its ``reduce_bucket_size``, in float32."""
TEACHERS: dict[str, tuple[str, str]] = {
    "depth_anything": ("AutoModelForDepthEstimation", ""),
    "oneformer": ("OneFormerModel", "pixel_level_module.encoder"),
    "unclip": ("CLIPVisionModelWithProjection", ""),
}
"""Kind -> transformers class that a configuration makes, and the part of it that is kept."""


@dataclass(frozen=True)
class Machine:
    """``gpus`` 0: the CPU; ``memory``: bytes a device; ``peak``: operations a second of one, None where unknown."""

    gpus: int
    memory: float | None
    engine: Engine = Engine.DDP
    peak: float | None = None

    @property
    def shards(self) -> int:
        """How many ways a sharding engine splits."""
        return max(1, self.gpus)


@dataclass(frozen=True)
class Choice:
    """What can be changed to make a run fit. ``checkpointing``: share of the layers computed again."""

    micro_batch: int
    checkpointing: float
    engine: Engine
    stored_targets: bool
    lora: bool


@dataclass
class Memory:
    """Bytes by what holds them, at the moment when most is held."""

    parts: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class TeacherSize:
    """A teacher's weights, what a batch of pictures holds while it runs, and the operations of a picture."""

    weights: float
    transient: float
    operations: float


class Planner:
    """Answers questions about one run on one machine. Raises ConfigError where a configuration cannot be had."""

    def __init__(self, run: Run, machine: Machine) -> None:
        self.run, self.machine = run, machine
        self.first = _assembled_by(run)
        self.specs: dict[str, TargetSpec] = {}
        self.teachers: dict[str, TeacherSize] = {}
        self.kept_alive: list[Teacher] = []
        if run.distillation is not None:
            for task, planned in planned_teachers(run.distillation).items():
                self.specs[task] = planned.spec
                self.teachers[task] = self._teacher(task)
        self.rows: Rows = rows_of(run, self.first, self._student())
        self.process = _resident() if not machine.gpus else CUDA_CONTEXT
        self.parts: list[PartCount] = count_parts(self._model(run.lora is not None, 0.0))
        self._traces: dict[Any, Traced] = {}

    @property
    def choice(self) -> Choice:
        """The run as it stands."""
        opt, lora = self.run.optimization, self.run.lora is not None
        stored = self.run.distillation is not None and self.run.distillation.targets is not None
        return Choice(opt.micro_batch, opt.gradient_checkpointing, self.machine.engine, stored, lora)

    def _student(self) -> Student:
        place = Path(self.run.start_from or "")
        for folder in (place / "model", place) if self.run.start_from else ():
            if (folder / "config.json").is_file() and not (place / "run.yaml").is_file():
                return _skeleton_of(folder)
        assert self.first.student is not None
        return build_skeleton(self.first.student)

    def _model(self, lora: bool, checkpointing: float) -> TrainingModel:
        run = self.run if lora else self.run.model_copy(update={"lora": None})
        if lora and run.lora is None:
            run = run.model_copy(update={"lora": Lora.model_validate({})})
        student = self._student()
        with torch.device("meta"):
            add_updates(run.lora, student)
            model = build_training_model(
                student, run.stage, run.distillation, {t: PlannedTeacher(s) for t, s in self.specs.items()}
            )
        set_trainable(model, run.stage, run.optimization, run.lora is not None, Console(quiet=True))
        if checkpointing:
            model.recompute_activations(checkpointing)
        return model

    def trace(self, shape: StepShape, checkpointing: float, lora: bool, accumulates: bool = False) -> Traced:
        """A micro-batch of ``shape``, each traced once."""
        key = (shape, checkpointing, lora, accumulates)
        if key not in self._traces:
            model = self._model(lora, checkpointing)
            half = self.run.optimization.precision == "bfloat16"
            with without_values(model):
                self._traces[key] = trace_step(model, shape, half, self.run.optimization.global_batch, accumulates)
        return self._traces[key]

    def _teacher(self, task: str) -> TeacherSize:
        assert self.run.distillation is not None
        settings = self.run.distillation.tasks[task].teacher
        name = self.run.distillation.teacher_dtype or (
            self.run.optimization.precision if self.machine.gpus else "float32"
        )
        dtype, images = DTYPES[name], self.run.optimization.micro_batch
        if settings.kind in TEACHERS:
            module = _teacher_skeleton(settings.kind, settings.model, settings.options).to(dtype)
            size = int(settings.options.get("size", {"depth_anything": 336, "oneformer": 768}.get(settings.kind, 224)))
            weights = sum(t.nbytes for t in (*module.parameters(), *module.buffers()))
            with without_values(module):
                one = trace_forward(module, (1, 3, size, size), dtype)
                return TeacherSize(weights, one.peak * images, one.operations)
        teacher = build_teacher(settings.kind, settings.model, **settings.options)
        height, width = getattr(teacher.preprocess, "size", (224, 224))
        with torch.no_grad():  # a small one: what it holds while it runs stays with the process and is measured there
            teacher(torch.zeros(images, 3, height, width))
        self.kept_alive.append(teacher)
        return TeacherSize(0.0 if not self.machine.gpus else sum(t.nbytes for t in teacher.parameters()), 0.0, 0.0)

    def memory(self, choice: Choice) -> Memory:
        """Bytes on one device (or of the process, on a CPU) at the moment when most are held."""
        opt, machine = self.run.optimization, self.machine
        model = self._model(choice.lora, choice.checkpointing)
        parameters = [*model.parameters(), *model.buffers()]
        learning = [p for p in model.parameters() if p.requires_grad]
        weights = float(sum(t.nbytes for t in parameters))
        gradients = float(sum(p.nbytes for p in learning))
        moments = float(sum(p.numel() for p in learning) * ADAM)
        sharded = choice.engine in SHARDED_WEIGHTS
        ways = 1 if choice.engine is Engine.DDP else machine.shards
        accumulates = opt.global_batch > choice.micro_batch * machine.shards or ways > 1
        images = max(1, round(choice.micro_batch * self.rows.pictures)) if self.rows.pictures else 0
        shape = StepShape(choice.micro_batch, self.rows.longest, self.rows.most_supervised, images)
        peak = float(self.trace(shape, choice.checkpointing, choice.lora, accumulates).peak)
        held = Memory({"process" if not machine.gpus else "CUDA context": self.process})
        held.parts["weights"] = weights / (ways if sharded else 1)
        if sharded:
            layers = model.student.model.language_model.layers.parameters()
            held.parts["gathered layers"] = 2.0 * _largest_layer(model) * (2 if opt.precision == "bfloat16" else 4)
            held.parts["gathered, all else"] = weights - sum(p.nbytes for p in layers)
        held.parts["optimizer"] = moments / ways
        if choice.engine in (Engine.ZERO2, Engine.ZERO3) and ways > 1:
            # DeepSpeed steps its own flat copy, and gathers gradients in a buffer of fixed size.
            held.parts["DeepSpeed's copy and buffer"] = gradients / ways + ZERO_BUFFER
        if not choice.stored_targets:
            held.parts["teachers"] = sum(teacher.weights for teacher in self.teachers.values())
        held.parts["targets"] = self._targets()
        ddp = gradients if machine.gpus > 1 and choice.engine is Engine.DDP else 0.0
        step = {"gradients": gradients / ways + ddp, "activations": max(0.0, peak - gradients)}
        largest = max((float(p.nbytes) for p in learning), default=0.0)
        # AdamW's fused-by-lists version holds one more copy of what learns; on a CPU, of one tensor.
        update = {"gradients": gradients / ways + ddp, "update": gradients / ways if machine.gpus else 2 * largest}
        running = max((teacher.transient for teacher in self.teachers.values()), default=0.0)
        teaching = {"teachers' activations": 0.0 if choice.stored_targets else running}
        phases: list[dict[str, float]] = [step, update, teaching]
        held.parts |= phases[max(range(len(phases)), key=lambda at: sum(phases[at].values()))]
        if not machine.gpus:
            held.parts["allocator, kernels (assumed)"] = CPU_CACHES * held.total
        held.parts = {name: size for name, size in held.parts.items() if size}
        return held

    def _targets(self) -> float:
        samples = self.run.optimization.global_batch * self.rows.pictures
        floats = sum(spec.tokens * spec.width for spec in self.specs.values())
        return samples * floats * 4 * (2 if self.machine.gpus > 1 else 1)  # gathered: the parts and the pool

    def operations(self) -> tuple[float, float]:
        """Of an average row: the step's (nothing recomputed), the teachers'."""
        rows = self.rows
        shape = StepShape(1, rows.mean, rows.supervised, 1 if rows.pictures else 0)
        student = self.trace(shape, 0.0, self.run.lora is not None).operations
        return student, rows.pictures * sum(teacher.operations for teacher in self.teachers.values())

    def steps(self) -> int:
        """Optimizer steps of the run."""
        opt = self.run.optimization
        whole = -(-self.rows.count * opt.epochs // opt.global_batch)
        return int(min(whole, opt.max_steps) if opt.max_steps else whole)

    def seconds(self) -> float | None:
        """Of the whole run as it stands at ``ASSUMED_MFU``; None where the device's peak is not known."""
        if self.machine.peak is None:
            return None
        student, teachers = self.operations()
        student *= 1 + self.choice.checkpointing / 3
        total = (student + teachers) * self.run.optimization.global_batch * self.steps()
        return total / (self.machine.peak * ASSUMED_MFU * self.machine.shards)

    def disk(self) -> dict[str, float]:
        """Bytes by what lies there."""
        run = self.run
        found: dict[str, float] = {}
        sets = [part for s in run.data.sources if s.data_set for part, _ in with_needs(s.data_set)]
        sizes = [download.estimate for part in sets for download in part.downloads]
        if sets:
            known = float(sum(size or 0 for size in sizes))
            least = ", at least (some sizes are not published)" if None in sizes else ""
            found[f"data, archives{least}"] = found[f"data, unpacked, about{least}"] = known
        floats = sum(spec.tokens * spec.width for spec in self.specs.values())
        if floats:
            found["targets, if stored in fp16"] = self.rows.count * self.rows.pictures * floats * 2
        learning = sum(part.trainable for part in self.parts)
        kept = run.logging.keep_checkpoints + 1
        found[f"checkpoints ({kept} at once)"] = kept * learning * (4.0 + ADAM)
        skipped = {"task_tokens", "predictors", "logit_scales", "lora"}
        total = sum(part.total for part in self.parts if part.part not in skipped)
        found["finished model"] = total * (2.0 if run.optimization.precision == "bfloat16" else 4.0)
        return found


def cheapest_that_fits(planner: Planner) -> tuple[Choice, Memory, str] | None:
    """The change that makes the run fit at the least cost, with its memory and its settings; None: nothing does."""
    limit = planner.machine.memory
    if limit is None:
        return None
    for choice in sorted(_choices(planner), key=lambda other: _cost(planner.choice, other)):
        memory = planner.memory(choice)
        if memory.total <= USABLE * limit:
            return choice, memory, describe(planner.choice, choice)
    return None


def _choices(planner: Planner) -> list[Choice]:
    now = planner.choice
    micro = [now.micro_batch]
    while micro[-1] % 2 == 0:
        micro.append(micro[-1] // 2)
    engines = [now.engine] + ([Engine.FSDP] if planner.machine.gpus > 1 and now.engine is not Engine.FSDP else [])
    stored = [now.stored_targets] + ([True] if planner.teachers and not now.stored_targets else [])
    lora = [now.lora] + ([True] if planner.run.stage is Stage.IFT and not now.lora else [])
    return [
        Choice(size, checkpointing, engine, store, low_rank)
        for size in micro
        for checkpointing in sorted({now.checkpointing, *(s for s in (0.5, 1.0) if s > now.checkpointing)})
        for engine in engines
        for store in stored
        for low_rank in lora
    ][1:]


def _cost(now: Choice, other: Choice) -> float:
    """Slowdown, roughly: what the choices are put in order by. LoRA trains another thing, so it comes last."""
    return (
        0.03 * math.log2(now.micro_batch / other.micro_batch)
        + 0.33 * (other.checkpointing - now.checkpointing)
        + 0.10 * (other.engine != now.engine)
        + 0.05 * (other.stored_targets and not now.stored_targets)
        + 1.00 * (other.lora and not now.lora)
    )


def describe(now: Choice, other: Choice) -> str:
    """The changes as settings."""
    parts = []
    if other.micro_batch != now.micro_batch:
        parts.append(f"optimization.micro_batch={other.micro_batch}")
    if other.checkpointing > now.checkpointing:
        slower = (other.checkpointing - now.checkpointing) / 3
        parts.append(f"optimization.gradient_checkpointing={other.checkpointing:g} (about {slower:.0%} more time)")
    if other.engine != now.engine:
        parts.append(f"launch.engine={other.engine}")
    if other.stored_targets and not now.stored_targets:
        parts.append("distillation.targets=STORE (`visper targets build` makes it; no teacher in memory)")
    if other.lora and not now.lora:
        parts.append("'lora: {rank: 64}' (learns low-rank updates of the LLM only)")
    return ", ".join(parts)


def _assembled_by(run: Run) -> Run:
    try:
        return first_stage(run)
    except ConfigError:
        place = Path(run.start_from or "")
        if any((folder / "config.json").is_file() for folder in (place, place / "model")):
            return run
        raise


def _skeleton_of(folder: Path) -> Student:
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        return Student(LlavaForConditionalGeneration(config), None, {})


def _largest_layer(model: TrainingModel) -> int:
    layers: Any = model.student.model.language_model.layers
    return sum(p.numel() for p in layers[0].parameters())


def _teacher_skeleton(kind: str, model: str, options: dict[str, Any]) -> nn.Module:
    import transformers

    name, part = TEACHERS[kind]
    config = sizes_of(str(model), f"{kind} teacher", str(options.get("subfolder", "")))
    made = getattr(transformers, name)
    with torch.device("meta"):
        whole: nn.Module = made.from_config(config) if name.startswith("Auto") else made(config)
    return whole.get_submodule(part).eval()


def _resident() -> float:
    """Bytes of this process in memory now, its libraries included."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:  # not Linux
        import resource

        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024
    return float(pages * 4096)
