"""The cost of a pre-training step: seconds by part, peak memory, tokens per second, utilization.

Weights are random, and so are the rows, all of the same length; the geometry is published or tiny. Nothing is
downloaded.

    python benchmarks/pretraining_step.py tiny --micro-batch 8                      # one CPU thread, minutes
    python benchmarks/pretraining_step.py llama3-8b --micro-batch 8 16 32 --teachers   # one 80 GB GPU or larger

The parts are each teacher, the forward pass (predictors and their losses also separately), the backward pass and the
optimizer. On a GPU, utilization is MFU as in the training log, without recomputation and teachers.
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    OneFormerConfig,
    OneFormerModel,
    PreTrainedModel,
    SwinConfig,
)

from visper.config import Stage, load_run
from visper.data.collator import Sizes
from visper.distillation import EmbeddingDistillation, Targets, TargetSpec, Teacher, build_teacher, query_rows
from visper.distillation.objective import DistilledTask
from visper.model import Student, TaskTokens, initial_queries
from visper.training.flops import FlopMeter
from visper.training.module import TrainingModel
from visper.training.stages import apply_stage

TASKS = ("depth", "seg", "gen")
PER_TASK = 8


@dataclass(frozen=True)
class Geometry:
    """Sizes of a student and its targets."""

    llm: dict[str, Any]
    vision: dict[str, Any]
    targets: dict[str, TargetSpec]
    layers: dict[str, tuple[int, ...]]
    text: int
    """Text tokens of a row, after 576 image tokens and 24 task tokens."""


GEOMETRIES = {
    "tiny": Geometry(
        llm={
            "vocab_size": 300,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        vision={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 48,
            "patch_size": 2,
        },
        targets={"depth": TargetSpec(576, 24), "seg": TargetSpec(64, 16), "gen": TargetSpec(1, 20)},
        layers={"depth": (3, 5), "seg": (2, 4), "gen": (2, 6)},
        text=90,
    ),
    "llama3-8b": Geometry(
        llm={
            "vocab_size": 128_256 + 26,
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
        vision={
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
        },
        targets={"depth": TargetSpec(576, 1024), "seg": TargetSpec(576, 1536), "gen": TargetSpec(1, 1024)},
        layers={"depth": (8, 20), "seg": (10, 18), "gen": (12, 20)},
        text=90,
    ),
}
SUPERVISED = 20


def published_teachers(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, Teacher]:
    """The three published teachers at full size with random weights, saved in ``dtype`` and loaded as in a run."""
    depth = DepthAnythingConfig(
        backbone_config=Dinov2Config(
            hidden_size=1024,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=518,
            patch_size=14,
            out_features=["stage5", "stage12", "stage18", "stage24"],
            reshape_hidden_states=False,
            apply_layernorm=True,
        ),
        reassemble_hidden_size=1024,
        neck_hidden_sizes=[256, 512, 1024, 1024],
        fusion_hidden_size=256,
    )
    swin = SwinConfig(
        image_size=384,
        embed_dim=192,
        depths=[2, 2, 18, 2],
        num_heads=[6, 12, 24, 48],
        window_size=12,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    image = CLIPVisionConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=16,
        patch_size=14,
        projection_dim=1024,
    )
    parts: dict[str, tuple[str, PreTrainedModel]] = {
        "depth": ("depth_anything", DepthAnythingForDepthEstimation(depth)),
        "seg": ("oneformer", OneFormerModel(OneFormerConfig(backbone_config=swin, is_training=False))),
        "gen": ("unclip", CLIPVisionModelWithProjection(image)),
    }
    teachers = {}
    for task, (kind, model) in parts.items():
        model.to(dtype).save_pretrained(folder / task)
        CLIPImageProcessor().save_pretrained(folder / task)  # a teacher needs its colors to be built
        teachers[task] = build_teacher(kind, folder / task)
    return teachers


def build_model(geometry: Geometry, device: str, dtype: torch.dtype, checkpointing: float) -> TrainingModel:
    """A student with random weights and its objective, set up for PT."""
    image_token = geometry.llm["vocab_size"] - 1
    config = LlavaConfig(
        text_config=LlamaConfig(**geometry.llm),
        vision_config=CLIPVisionConfig(**geometry.vision),
        image_token_index=image_token,
    )
    with torch.device(device):
        llava = LlavaForConditionalGeneration._from_config(config, dtype=dtype)
    ids = {t: [image_token - 24 + PER_TASK * i + j for j in range(PER_TASK)] for i, t in enumerate(TASKS)}
    student = Student(llava, None, ids)  # no text is processed here
    distillation = load_run("llama3-8b-vit-l/pt").distillation
    assert distillation is not None
    specs = {task: distillation.tasks[task].head for task in TASKS}
    tasks = {t: DistilledTask(geometry.targets[t], geometry.layers[t], specs[t]) for t in TASKS}
    rows = {task: query_rows(specs[task], geometry.targets[task], PER_TASK) for task in TASKS}
    queries = initial_queries(student, rows, torch.Generator().manual_seed(0))
    objective = EmbeddingDistillation(tasks, student.hidden_size, student.num_layers)
    model = TrainingModel(student, TaskTokens(ids, queries), objective).to(device)
    apply_stage(model, Stage.PT)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if checkpointing:
        model.recompute_activations(checkpointing)
    return model.train()


def random_batch(geometry: Geometry, model: TrainingModel, size: int, device: str) -> dict[str, Any]:
    """Rows of the same length: image, task tokens, and text whose last tokens are supervised."""
    image_token, task_ids = model.image_token_id, model.task_token_ids
    side = geometry.vision["image_size"]
    tokens = (side // geometry.vision["patch_size"]) ** 2
    block = [image_token] * tokens + [token for ids in task_ids.values() for token in ids]
    text = torch.randint(3, geometry.llm["vocab_size"] - 30, (size, geometry.text))
    ids = torch.cat((torch.tensor(block).expand(size, -1), text), dim=1)
    labels = torch.full_like(ids, -100)
    labels[:, -SUPERVISED:] = ids[:, -SUPERVISED:]
    pixels = torch.randn(size, 3, side, side, dtype=next(model.student.parameters()).dtype)
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "pixel_values": pixels,
        "image_rows": torch.arange(size),
    }
    return {name: value.to(device) for name, value in batch.items()} | {
        "num_tokens": SUPERVISED * size,
        "num_images": size,
    }


class Stopwatch:
    """Times parts in seconds, and waits for the device before and after each."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.parts: dict[str, list[float]] = {}

    def now(self) -> float:
        """Seconds: wall-clock time on a GPU; CPU time on a CPU, so that other jobs do not count."""
        if self.device == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = self.now()
        yield
        self.parts.setdefault(part, []).append(self.now() - start)

    @contextlib.contextmanager
    def inside(self, module: nn.Module, part: str) -> Iterator[None]:
        """Times every forward pass of ``module`` inside the context."""
        timers: list[Any] = []

        def enter(*_: Any) -> None:
            timers.append(self(part))
            timers[-1].__enter__()

        def leave(*_: Any) -> None:
            timers.pop().__exit__(None, None, None)

        handles = (module.register_forward_pre_hook(enter), module.register_forward_hook(leave))
        yield
        for handle in handles:
            handle.remove()

    def medians(self) -> dict[str, float]:
        """Median seconds of each part."""
        return {part: statistics.median(taken) for part, taken in self.parts.items()}


def targets_of(
    geometry: Geometry, teachers: dict[str, Teacher], size: int, device: str, watch: Stopwatch
) -> dict[str, Targets]:
    """Targets of live teachers, each timed, or random targets like those of a store."""
    found: dict[str, Tensor] = {}
    for task in TASKS:
        spec = geometry.targets[task]
        if task in teachers:
            side = {"depth": 336, "seg": 768, "gen": 224}[task]
            pixels = torch.randn(size, 3, side, side, device=device)
            with watch(f"teacher {task}"):
                found[task] = teachers[task](pixels).float()
        else:
            found[task] = torch.randn(size, spec.tokens, spec.width, device=device)
    return {task: Targets(own, own, torch.arange(size, device=device)) for task, own in found.items()}


def measure(
    geometry: Geometry,
    model: TrainingModel,
    teachers: dict[str, Teacher],
    size: int,
    steps: int,
    device: str,
    load: Callable[[], object] | None = None,
) -> dict[str, float]:
    """Medians over ``steps`` steps, after two that are not counted. ``load`` runs before each and is timed as data."""
    batch = random_batch(geometry, model, size, device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=device == "cuda")
    watch = Stopwatch(device)
    half = next(model.student.parameters()).dtype != torch.float32
    assert model.objective is not None
    for step in range(steps + 2):
        if step == 2:
            watch.parts.clear()
        with watch("step"):
            if load is not None:
                with watch("data"):
                    load()
            targets = targets_of(geometry, teachers, size, device, watch)
            with (
                torch.autocast(device, torch.bfloat16, enabled=half),
                watch("forward"),
                watch.inside(model.objective, "of it predictors"),
            ):
                loss = model(**batch, targets=targets)["loss"]
            with watch("backward"):
                loss.backward()
            with watch("optimizer"):
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    assert torch.isfinite(loss)
    return watch.medians()


def operations(geometry: Geometry, model: TrainingModel, size: int, device: str) -> float:
    """Model FLOPs of the forward and backward pass of ``size`` rows, counted as for the log's MFU."""
    batch = random_batch(geometry, model, size, device)
    targets = targets_of(geometry, {}, size, device, Stopwatch(device))
    half = next(model.student.parameters()).dtype != torch.float32
    tokens, meter = batch["input_ids"].shape[1], FlopMeter()
    images = size * int((batch["input_ids"][0] == model.image_token_id).sum())
    sizes = Sizes((tokens,) * size, SUPERVISED * size, images, size * tokens**2)
    with torch.autocast(device, torch.bfloat16, enabled=half), meter.watch(model, size * tokens, sizes):
        model(**batch, targets=targets)
    assert meter.costs is not None
    return meter.costs.flops(sizes.tokens, sizes.pairs, sizes.supervised, sizes.image_tokens)


def product_seconds(flops: float, device: str) -> float:
    """Seconds of plain float32 matrix products with this many FLOPs in this process: the machine's current speed."""
    one, other = torch.randn(2, 1024, 1024, device=device)
    watch = Stopwatch(device)
    for _ in range(7):
        with watch("product"):
            one @ other
    return watch.medians()["product"] * flops / (2 * 1024**3)


def peak_gib(device: str) -> float:
    """Peak memory so far: the allocator's on a GPU, the process's on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def report(*cells: str) -> None:
    """One row of a Markdown table."""
    print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    """Prints one Markdown table."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("geometry", choices=GEOMETRIES)
    parser.add_argument("--micro-batch", type=int, nargs="+", default=[8])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument(
        "--teachers", action="store_true", help="live teachers at published size; default: given targets"
    )
    parser.add_argument(
        "--checkpointing", type=float, default=1.0, help="share of the layers that are recomputed, 0 to 1"
    )
    parser.add_argument("--peak", type=float, default=989e12, help="the device's bf16 FLOPs per second (H100, H200)")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)
    imports = peak_gib("cpu")
    geometry = GEOMETRIES[options.geometry]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    on_gpu = device == "cuda"
    model = build_model(geometry, device, dtype, options.checkpointing)
    counted = operations(geometry, model, 1, device)
    teachers: dict[str, Teacher] = {}
    if options.teachers:
        with tempfile.TemporaryDirectory() as folder:
            teachers = {t: teacher.to(device, dtype) for t, teacher in published_teachers(Path(folder)).items()}
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU, one thread"
    print(
        f"{options.geometry}, {machine}, torch {torch.__version__}, transformers {transformers.__version__}; "
        f"{imports:.2f} GiB of the process's memory are imports"
    )
    if options.geometry == "tiny":
        print(
            "published code, on a quiet day, 8 rows: 4.7 CPU seconds, 1.65 GiB with its imports, not recorded "
            f"(days differ by 1.8 x); half of it beyond imports as large as these: {(1.65 - imports) / 2:.2f} GiB"
        )
    print()
    for number, size in enumerate(options.micro_batch):
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        found = measure(geometry, model, teachers, size, options.steps, device)
        tokens = size * random_batch(geometry, model, 1, device)["input_ids"].shape[1]
        if number == 0:
            report(
                "micro-batch",
                *(f"{part} s" for part in found),
                "peak GiB",
                "beyond imports",
                "product s",
                "tokens/s",
                "MFU",
            )
            report(*["---"] * (len(found) + 6))
        share = f"{counted * size / found['step'] / options.peak:.1%}" if on_gpu else ""
        seconds = (f"{value:.3f}" for value in found.values())
        peak, product = peak_gib(device), product_seconds(counted * size, device)
        memory = (f"{peak:.2f}", f"{peak - (0 if on_gpu else imports):.2f}", f"{product:.3f}")
        report(str(size), *seconds, *memory, f"{tokens / found['step']:.0f}", share)


if __name__ == "__main__":
    main()
