"""``visper plan``: estimates what a run needs, without loading weights."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from visper.common.console import Console

if TYPE_CHECKING:
    from visper.planning.memory import Memory
    from visper.planning.plan import Plan

NAME = "plan"
NETWORK = 50e9
"""Bytes per second of one 400 Gb/s adapter per GPU, usual between nodes of H100s."""


def run(
    recipe: Annotated[str, typer.Argument(help="a YAML file or a shipped recipe's name", metavar="RUN.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="changes, such as optimization.micro_batch=4")] = None,
    gpus: Annotated[int, typer.Option(min=0, help="number of GPUs on all nodes together; 0: the CPU")] = 1,
    gpu: Annotated[str, typer.Option(help="name of the GPU, for its peak FLOPs and memory")] = "H100",
    gpu_memory: Annotated[
        float | None, typer.Option(min=1, help="memory of one GPU in GB (10^9 bytes); default: by the GPU's name")
    ] = None,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs per node, for the host memory of a node")] = 8,
    hourly_price: Annotated[float | None, typer.Option(min=0, help="price of one GPU hour")] = None,
) -> None:
    """Estimate what a run needs: parameters, memory, FLOPs, time, cost, disk; and what to change if it does not fit.

    No weights are loaded: sizes come from configurations, and a step is traced without values. If the run does not fit,
    the last line is an error that names the estimate and the first change that fits.

    Example: `visper plan llama3-8b-vit-l/ift launch.engine=fsdp --gpus 8 --gpu H100 --hourly-price 2.5`
    """
    from visper.common.collector import collector_paused
    from visper.common.gpus import find_gpu
    from visper.config import load_run

    settings = load_run(recipe, overrides or [])
    kind = find_gpu(gpu, gpu_memory) if gpus else None
    memory = gpu_memory * 1e9 if gpu_memory else kind.memory_gb * 1e9 if kind else None
    with collector_paused():
        from visper.planning.memory import Machine
        from visper.planning.plan import Plan

        plan = Plan(settings, Machine(gpus, memory, kind.peak if kind else None, gpus_per_node))
        _show(plan, gpu, hourly_price, Console())
        _require_fit(plan)


def _show(plan: "Plan", gpu: str, price: float | None, console: Console) -> None:
    rows, machine, opt = plan.rows, plan.machine, plan.run.optimization
    console.print(_parts(plan))
    console.print(
        f"rows: {rows.count:,}; tokens per row: {rows.average.tokens} on average, {rows.longest.tokens} at most "
        f"({rows.source})",
        markup=False,
    )
    place = f"{machine.gpus} x {gpu}, {plan.run.launch.engine}" if machine.gpus else "CPU, the training process"
    console.print(_memory(plan.memory, f"memory per device: {place}; micro-batch {opt.micro_batch}"))
    if plan.host:
        console.print(_host(plan))
    if opt.gradient_checkpointing == "auto":
        console.print(f"recomputation (auto): {plan.settings.checkpointing:g} of the layers")
    if plan.run.packed:
        measured = "for the packed micro-batch with the most tokens in an epoch"
        bound = "an upper bound: every row is assumed to be as long as the longest, because row lengths are not known"
        console.print(f"packed rows: memory is {measured if rows.sample else bound}")
    if machine.usable is not None and machine.memory is not None:
        console.print(
            f"{plan.memory.total / 1e9:.1f} GB of {machine.memory / 1e9:.0f} GB ({machine.usable / 1e9:.1f} GB "
            f"usable): {'fits' if plan.fits else 'does NOT fit'}"
        )
    step, teachers = plan.step_flops, plan.teacher_flops / (plan.row_flops + plan.teacher_flops)
    console.print(
        f"FLOPs: {step:.3g} per step, {step * plan.steps:.3g} in {plan.steps:,} steps; teachers: {teachers:.0%} of "
        "them (onnx teachers are not counted; of custom teachers, only torch operations are)"
    )
    console.print(_time(plan, price))
    if machine.gpus > 1 and plan.sent is not None:
        console.print(
            f"network: each process sends {plan.sent / 1e9:.2f} GB per step, {plan.sent / NETWORK:.2f} s at 400 Gb/s "
            "per GPU without overlap"
        )
    for what, size in plan.disk.items():
        console.print(f"disk: {what}: {size / 1e9:,.2f} GB")


def _time(plan: "Plan", price: float | None) -> str:
    from visper.planning.plan import ASSUMED_MFU

    if plan.seconds is None:
        return "time: not estimated, because the device's FLOPs per second are not known; run a few steps to measure it"
    hours, gpus = plan.seconds / 3600, plan.machine.gpus
    cost = f"; cost {hours * gpus * price:,.0f} at {price:g} per GPU hour" if price else ""
    return f"time: {hours:.1f} h, {hours * gpus:.0f} GPU hours, assuming MFU {ASSUMED_MFU:.0%}{cost}"


def _require_fit(plan: "Plan") -> None:
    from visper.common.errors import ConfigError

    if plan.fits:
        return
    assert plan.machine.usable is not None
    lever = (
        f"first change that fits: {plan.lever.changes} -> {plan.lever.memory.total / 1e9:.1f} GB"
        if plan.lever
        else "no setting makes it fit: use more or larger GPUs, or a smaller LLM"
    )
    raise ConfigError(
        f"'{plan.run.name}' needs an estimated {plan.memory.total / 1e9:.1f} GB on each device, but only "
        f"{plan.machine.usable / 1e9:.1f} GB are usable; {lever}"
    )


def _parts(plan: "Plan") -> Table:
    table = Table("part", "parameters", "trainable", box=None, pad_edge=False)
    for part in plan.parts:
        if part.total:
            table.add_row(part.part, f"{part.total:,}", f"{part.trainable:,}")
    table.add_row("total", *(f"{sum(getattr(p, what) for p in plan.parts):,}" for what in ("total", "trainable")))
    return table


def _memory(memory: "Memory", title: str) -> Table:
    table = Table(title, "GB", box=None, pad_edge=False)
    for name, size in memory.parts.items():
        table.add_row(name, f"{size / 1e9:.2f}")
    table.add_row("peak", f"{memory.total / 1e9:.2f}")
    return table


def _host(plan: "Plan") -> Table:
    count = next(iter(plan.host.values())).processes
    table = Table(
        "host memory while ...", "first process, GB", "any other", f"node of {count}", box=None, pad_edge=False
    )
    for moment, held in plan.host.items():
        other = f"{held.other / 1e9:.2f}" if plan.machine.processes > 1 else ""
        table.add_row(moment, f"{held.first / 1e9:.2f}", other, f"{held.node / 1e9:.2f}")
    return table
