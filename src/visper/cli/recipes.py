"""``visper recipes``: lists and shows the shipped recipes."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from visper.common.console import Console

if TYPE_CHECKING:
    from visper.config import Run

NAME = "recipes"


def run(
    name: Annotated[str | None, typer.Argument(help="show this recipe, resolved", metavar="[NAME]")] = None,
    parameters: Annotated[bool, typer.Option("--parameters", help="count NAME's parameters")] = False,
) -> None:
    """List the shipped recipes, or show one resolved, or count the parameters of its model.

    Counting needs no weights; configurations of other than the published bases are downloaded.

    Example: `visper recipes llama3-8b-vit-l/pt --parameters`
    """
    from visper.common.errors import ConfigError
    from visper.config import load_run, recipe_names, run_text

    if name is None:
        if parameters:
            raise ConfigError("--parameters needs a recipe: name it, as in visper recipes NAME --parameters")
        Console().print(_listed({recipe: load_run(recipe) for recipe in recipe_names()}))
    elif parameters:
        Console().print(_sizes(name, load_run(name)))
    else:
        print(run_text(load_run(name)), end="")


def _listed(runs: "dict[str, Run]") -> Table:
    from visper.config import VlmStudent

    table = Table("recipe", "stage", "batch", "rate", "starts from", box=None, pad_edge=False)
    for recipe, settings in runs.items():
        student = settings.student
        start = str(settings.start_from)
        if student is not None:
            start = student.vlm if isinstance(student, VlmStudent) else f"{student.llm} + {student.encoder}"
        optimization = settings.optimization
        table.add_row(
            recipe,
            str(settings.stage),
            str(optimization.global_batch),
            f"{optimization.lr:g}",
            Text(start, no_wrap=True, overflow="ellipsis"),
        )
    for column in table.columns[:-1]:
        column.no_wrap = True  # a narrow console cuts off only what a recipe starts from
    return table


def _sizes(name: str, settings: "Run") -> Table:
    from visper.config import Stage
    from visper.planning.parameters import part_sizes

    sizes = part_sizes(settings)
    table = Table("part", title=f"{name}: parameters, all and trainable", show_footer=True)
    table.columns[0].footer = "total"
    columns = {"all": [size.total for size in sizes]}
    columns |= {f"in {stage}": [size.trainable[stage] for size in sizes] for stage in Stage}
    for header, counts in columns.items():
        table.add_column(header, f"{sum(counts):,}", justify="right", no_wrap=True)
    for row, size in enumerate(sizes):
        table.add_row(size.part, *(f"{counts[row]:,}" for counts in columns.values()))
    return table
