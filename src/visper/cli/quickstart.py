"""``visper quickstart``: all stages on a laptop, without network or GPU."""

import os
from pathlib import Path
from typing import Annotated

import typer

from visper.cli.arguments import path_option

NAME = "quickstart"


def run(
    out: Annotated[Path, path_option(help="folder for all results")] = Path("visper-quickstart"),
    seed: Annotated[int, typer.Option(min=0, help="seed of the world, the projector and the order of rows")] = 0,
    fast: Annotated[bool, typer.Option("--fast", help="only check that everything runs, in two minutes")] = False,
    objective: Annotated[
        str | None, typer.Option(help="a recipe whose embedding losses replace the quickstart's, e.g. visual/viral")
    ] = None,
) -> None:
    """Render a world, pre-train with distillation, fine-tune, evaluate, and write a report. No network, no GPU.

    Example: `visper quickstart --seed 1 --out my-quickstart`
    """
    # torch reads it on import. With models this small, a second thread helps little on an idle machine, and makes a
    # step tens of times slower on a busy one.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    from visper.common.console import Console
    from visper.quickstart.report import write_report
    from visper.quickstart.run import FAST, FULL, check_learning, quickstart

    console = Console()
    budget = FAST if fast else FULL
    result = quickstart(out, seed, budget, console, objective=objective)
    check_learning(result)
    console.print(f"report: {write_report(result, budget)}")
