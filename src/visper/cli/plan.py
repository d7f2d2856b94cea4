"""``visper plan``: what a run needs, before anything is loaded."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from visper.planning.plan import Memory, Planner

NAME = "plan"


def run(
    recipe: Annotated[str, typer.Argument(help="a YAML file or a shipped recipe's name", metavar="RUN.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="changes, such as optimization.micro_batch=4")] = None,
    gpus: Annotated[int, typer.Option(min=0, help="GPUs, of all nodes together; 0: the CPU")] = 1,
    gpu: Annotated[str, typer.Option(help="GPU by name, for its peak and memory")] = "H100",
    gpu_memory: Annotated[float | None, typer.Option(help="GB (10^9 bytes) of one; default: the GPU's own")] = None,
    hourly_price: Annotated[float | None, typer.Option(help="price of one GPU for an hour")] = None,
) -> None:
    """Say what a run needs: parameters, memory, operations, time, cost, disk; and what to change where it does not fit.

    Nothing is loaded: sizes come from configurations, a step is traced without values.

    Example: `visper plan llama3-8b-vit-l/ift launch.engine=fsdp --gpus 8 --gpu H100 --hourly-price 2.5`
    """
    from visper.common.gpus import known_gpu
    from visper.config import load_run
    from visper.planning.plan import Machine, Planner

    settings = load_run(recipe, overrides or [])
    kind = known_gpu(gpu) if gpus else None
    memory = (gpu_memory or kind.memory_gb) * 1e9 if kind else (gpu_memory * 1e9 if gpu_memory else None)
    planner = Planner(settings, Machine(gpus, memory, settings.launch.engine, kind.peak if kind else None))
    _show(planner, gpu, hourly_price, Console())


def _show(planner: "Planner", gpu: str, price: float | None, console: Console) -> None:
    from visper.planning.plan import ASSUMED_MFU, USABLE, cheapest_that_fits

    console.print(_parts(planner))
    rows, machine, opt = planner.rows, planner.machine, planner.run.optimization
    console.print(
        f"rows: {rows.count:,}; tokens a row {rows.mean} on average, {rows.longest} at most ({rows.source})",
        markup=False,
    )
    memory = planner.memory(planner.choice)
    place = f"{machine.gpus} x {gpu}, {machine.engine}" if machine.gpus else "CPU, the training process"
    console.print(_memory(memory, f"memory of each: {place}; micro-batch {opt.micro_batch}"))
    if machine.memory is not None:
        fits = memory.total <= USABLE * machine.memory
        verdict = "fits" if fits else "does NOT fit"
        console.print(
            f"{memory.total / 1e9:.1f} GB of {machine.memory / 1e9:.0f} GB ({USABLE:.0%} may be filled): {verdict}"
        )
        if not fits:
            found = cheapest_that_fits(planner)
            console.print(
                f"cheapest change that fits: {found[2]} -> {found[1].total / 1e9:.1f} GB"
                if found
                else "no single-setting change here fits: use more or larger GPUs, or a smaller LLM",
                markup=False,
            )
    student, teachers = planner.operations()
    steps = planner.steps()
    total = (student + teachers) * opt.global_batch
    console.print(
        f"operations: {total:.3g} a step, {total * steps:.3g} in {steps:,} steps; teachers "
        f"{teachers / (student + teachers):.0%} of them (those of kind onnx and your own are not counted)"
    )
    seconds = planner.seconds()
    if seconds is None:
        console.print("time: not estimated on a CPU; a few steps of the run tell it")
    else:
        hours = seconds / 3600
        cost = f"; cost {hours * machine.gpus * price:,.0f} at {price:g} a GPU hour" if price else ""
        console.print(
            f"time: {hours:.1f} h, {hours * machine.gpus:.0f} GPU hours, assuming MFU {ASSUMED_MFU:.0%}{cost}"
        )
    for what, size in planner.disk().items():
        console.print(f"disk: {what}: {size / 1e9:,.2f} GB")


def _parts(planner: "Planner") -> Table:
    table = Table("part", "parameters", "learning", box=None, pad_edge=False)
    for part in planner.parts:
        if part.total:
            table.add_row(part.part, f"{part.total:,}", f"{part.trainable:,}")
    table.add_row("total", *(f"{sum(getattr(p, what) for p in planner.parts):,}" for what in ("total", "trainable")))
    return table


def _memory(memory: "Memory", title: str) -> Table:
    table = Table(title, "GB", box=None, pad_edge=False)
    for name, size in memory.parts.items():
        table.add_row(name, f"{size / 1e9:.2f}")
    table.add_row("peak", f"{memory.total / 1e9:.2f}")
    return table
