"""``visper plan``: what a run needs, before anything is loaded."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from visper.common.console import Console

if TYPE_CHECKING:
    from visper.planning.memory import Memory
    from visper.planning.plan import Plan

NAME = "plan"
NETWORK = 50e9
"""Bytes per second of a 400 Gb/s adapter for each GPU, usual between nodes of H100s."""


def run(
    recipe: Annotated[str, typer.Argument(help="a YAML file or a shipped recipe's name", metavar="RUN.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="changes, such as optimization.micro_batch=4")] = None,
    gpus: Annotated[int, typer.Option(min=0, help="GPUs, of all nodes together; 0: the CPU")] = 1,
    gpu: Annotated[str, typer.Option(help="GPU by name, for its peak and memory")] = "H100",
    gpu_memory: Annotated[
        float | None, typer.Option(min=1, help="GB (10^9 bytes) of one; default: the GPU's own")
    ] = None,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of a node, for its host memory")] = 8,
    hourly_price: Annotated[float | None, typer.Option(min=0, help="price of one GPU for an hour")] = None,
) -> None:
    """Say what a run needs: parameters, memory, FLOPs, time, cost, disk; and what to change where it does not fit.

    Nothing is loaded: sizes come from configurations, a step is traced without values. Where the run does not fit, the
    last line is an error that names the estimate and the first change that fits.

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
        from visper.planning.plan import plan

        found = plan(settings, Machine(gpus, memory, kind.peak if kind else None, gpus_per_node))
    _show(found, gpu, hourly_price, Console())
    _require_fit(found)


def _show(plan: "Plan", gpu: str, price: float | None, console: Console) -> None:
    rows, machine, opt = plan.rows, plan.machine, plan.run.optimization
    console.print(_parts(plan))
    console.print(
        f"rows: {rows.count:,}; tokens a row {rows.average.tokens} on average, {rows.longest.tokens} at most "
        f"({rows.source})",
        markup=False,
    )
    place = f"{machine.gpus} x {gpu}, {plan.run.launch.engine}" if machine.gpus else "CPU, the training process"
    console.print(_memory(plan.memory, f"memory of each: {place}; micro-batch {opt.micro_batch}"))
    if plan.host:
        console.print(_host(plan))
    if opt.gradient_checkpointing == "auto":
        console.print(f"recomputation, chosen (auto): {plan.settings.checkpointing:g} of the layers")
    if plan.run.packed:
        measured = "the most tokens of a packed micro-batch in an epoch"
        bound = "an upper bound: every row is taken to be as long as the longest, because no row lengths are known"
        console.print(f"packed rows: memory is for {measured if rows.sample else bound}")
    if machine.usable is not None and machine.memory is not None:
        console.print(
            f"{plan.memory.total / 1e9:.1f} GB of {machine.memory / 1e9:.0f} GB ({machine.usable / 1e9:.1f} GB may be "
            f"filled): {'fits' if plan.fits else 'does NOT fit'}"
        )
    step, teachers = plan.step_flops, plan.teacher_flops / (plan.row_flops + plan.teacher_flops)
    console.print(
        f"FLOPs: {step:.3g} a step, {step * plan.steps:.3g} in {plan.steps:,} steps; teachers {teachers:.0%} of them "
        "(of onnx teachers nothing is counted, of your own what torch computes)"
    )
    console.print(_time(plan, price))
    if machine.gpus > 1 and plan.sent is not None:
        console.print(
            f"network: each process sends {plan.sent / 1e9:.2f} GB a step, {plan.sent / NETWORK:.2f} s at 400 Gb/s a "
            "GPU if nothing overlaps"
        )
    for what, size in plan.disk.items():
        console.print(f"disk: {what}: {size / 1e9:,.2f} GB")


def _time(plan: "Plan", price: float | None) -> str:
    from visper.planning.plan import ASSUMED_MFU

    if plan.seconds is None:
        return (
            "time: not estimated, as the FLOPs per second of the device are not known; a few steps of the run tell it"
        )
    hours, gpus = plan.seconds / 3600, plan.machine.gpus
    cost = f"; cost {hours * gpus * price:,.0f} at {price:g} a GPU hour" if price else ""
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
        f"'{plan.run.name}' needs an estimated {plan.memory.total / 1e9:.1f} GB on each device, where "
        f"{plan.machine.usable / 1e9:.1f} GB may be filled; {lever}"
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
