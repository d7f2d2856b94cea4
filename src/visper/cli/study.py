"""``visper study``: a controlled comparison of visual supervision on rendered scenes."""

import os
from pathlib import Path
from typing import Annotated

import typer

from visper.cli.arguments import path_option

NAME = "study"


def run(
    out: Annotated[Path, path_option(help="folder for all results")] = Path("visper-study"),
    seeds: Annotated[int, typer.Option(min=1, help="number of seeds; intervals need two, a claim five")] = 5,
    arms: Annotated[list[str] | None, typer.Option("--arm", help="an arm; repeatable. Default: all arms")] = None,
    fast: Annotated[bool, typer.Option("--fast", help="only check that everything runs")] = False,
) -> None:
    """Compare ways to supervise, on the same seeds, data and labels.

    Repeat the command to continue after an interruption. Started several times, the processes share the work.

    Example: `visper study --seeds 2 --arm nothing --arm published`
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # see `visper quickstart`

    from visper.common.console import Console
    from visper.evaluation.probe.curves import require_drawable
    from visper.study.arms import ARMS, FAST, FULL
    from visper.study.report import report
    from visper.study.run import study

    console, size = Console(), FAST if fast else FULL
    require_drawable(out / "curves.svg")  # checked now, because it is drawn hours later
    results, probes = study(out, range(1, seeds + 1), size, console, tuple(arms or ARMS))
    report(results, probes, list(size.labels), out, console)
    console.print(f"report: {out / 'report.json'}, curves: {out / 'curves.svg'}, probes: {out / 'probes.svg'}")
