"""``visper targets``: computes and checks a store of a run's targets."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from visper.cli.arguments import path_option
from visper.common.console import Console
from visper.common.errors import counted

NAME = "targets"
app = typer.Typer(help="Teachers' targets, computed once into a store that training reads.", no_args_is_help=True)

Recipe = Annotated[str, typer.Argument(help="a YAML file or a shipped recipe's name", metavar="RUN.yaml")]
Overrides = Annotated[list[str] | None, typer.Argument(help="changes, such as data.geometry=pad")]
Store = Annotated[Path, path_option("--out", help="the store's folder")]


class Dtype(str, Enum):
    """The storage type of targets."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    INT8 = "int8"
    FP8 = "fp8"


@app.command("build")
def build(
    recipe: Recipe,
    out: Store,
    overrides: Overrides = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="storage type; default: the store's own, float16 for a new one")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="images per batch of a teacher")] = 32,
    size: Annotated[bool, typer.Option("--size", help="only print how large the store will be")] = False,
) -> None:
    """Compute the targets of a run's images. Safe to kill and repeat; `torchrun` splits the work among processes.

    Example: `visper targets build llama3-8b-vit-l/pt --out targets/llava-558k --dtype int8`
    """
    from visper.config import load_run

    settings = load_run(recipe, overrides or [])

    from visper.target_store.build import build_targets

    build_targets(settings, out, None if dtype is None else dtype.value, batch, size)


@app.command("check")
def check(
    recipe: Recipe,
    out: Store,
    overrides: Overrides = None,
    quick: Annotated[bool, typer.Option("--quick", help="do not verify the targets' checksums")] = False,
) -> None:
    """Check that the store has all targets of a run, undamaged.

    Exit code 1: some are missing or damaged; 2: they were made by other teachers.

    Example: `visper targets check llama3-8b-vit-l/pt --out targets/llava-558k`
    """
    from visper.config import load_run

    arguments = [recipe, *(overrides or [])]
    settings = load_run(recipe, overrides or [])

    from visper.data.images import background_of
    from visper.model.start import starting_processor
    from visper.target_store.build import build_targets
    from visper.target_store.open import build_command, damaged_parts, open_targets

    console = Console(soft_wrap=True)
    geometry = settings.data.geometry.value
    background = background_of(starting_processor(settings).image_processor)
    remedy = build_command(out, arguments)
    if settings.distillation is not None and not quick:
        damaged = list(damaged_parts(settings.distillation, geometry, background, out, remedy))
        for part in damaged:
            console.print(f"damaged: {part}")
        if damaged:
            files = counted(len(damaged), "damaged file")
            console.print(f"remove the {files}, then run {remedy} to compute the lost targets again")
            raise typer.Exit(1)
    open_targets(settings.distillation, geometry, background, out, arguments)
    plan = build_targets(settings, out, size_only=True)
    missing = {task for part in plan.parts for task in part.tasks}
    if missing:
        console.print(f"incomplete: {', '.join(sorted(missing))}")
        raise typer.Exit(1)
    console.print(f"complete: {plan.images:,} images" + ("" if quick else ", all checksums match"))
