"""``visper recipes``: what is shipped."""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

NAME = "recipes"


def run(
    name: Annotated[str | None, typer.Argument(help="show this recipe, resolved", metavar="[NAME]")] = None,
) -> None:
    """List the shipped recipes, or show one with everything it extends.

    Example: `visper recipes llama3-8b-vit-l/pt`
    """
    from visper.config import load_run, recipe_names, run_text

    if name is not None:
        print(run_text(load_run(name)), end="")
        return
    table = Table("recipe", "stage", "starts from", "global batch", "rate")
    for recipe in recipe_names():
        settings = load_run(recipe)
        student = settings.student
        start = f"{student.llm} + {student.encoder}" if student else str(settings.start_from)
        optimisation = settings.optimisation
        table.add_row(recipe, str(settings.stage), start, str(optimisation.global_batch), f"{optimisation.lr:g}")
    Console().print(table)
