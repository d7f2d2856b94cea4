"""``visper data``: lists data sets and downloads them."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from visper.cli.arguments import path_option
from visper.common.console import Console

NAME = "data"
app = typer.Typer(help="Data sets: list, download and check them.", no_args_is_help=True)

Root = Annotated[Path, path_option("--root", help="folder of all data sets; 'data.root' of a run")]


@app.command("list")
def list_sets(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="list only these sets: names or your own YAML files", metavar="[NAME|FILE.yaml]"),
    ] = None,
    root: Root = Path("data"),
) -> None:
    """List data sets: their use, their size, and their state under the root. Named sets also show their license.

    Example: `visper data list --root data`
    """
    from visper.data.sets.catalog import listing, set_names

    console = Console()
    table = Table("set", "for", "downloads", "disk", f"under '{root}'", box=None, pad_edge=False)
    entries = listing(names or set_names(), root)
    for entry in entries:
        table.add_row(entry.name, entry.use, entry.size, entry.disk, entry.state)
    console.print(table)
    console.print(
        "disk: at most, for archives and images together; --drop-archives frees the archives' part. "
        "'+': plus files without a published size."
    )
    for entry in entries if names else ():
        console.print(f"{entry.name}: {entry.title}. License: {entry.license}")


@app.command("prepare")
def prepare_sets(
    names: Annotated[list[str], typer.Argument(help="sets, or your own YAML files", metavar="NAME|FILE.yaml ...")],
    root: Root = Path("data"),
    everything: Annotated[bool, typer.Option("--all", help="unpack all files, not only those the rows name")] = False,
    drop_archives: Annotated[bool, typer.Option("--drop-archives", help="delete archives once unpacked")] = False,
    workers: Annotated[int, typer.Option(min=1, help="simultaneous downloads")] = 4,
) -> None:
    """Download, verify and unpack data sets and the sets they need. Safe to interrupt and to repeat.

    Example: `visper data prepare llava-pretrain llava-665k --root data --drop-archives`
    """
    from visper.data.sets.prepare import prepare

    console = Console(soft_wrap=True)
    for name in names:
        outcome = prepare(name, root, everything, drop_archives, workers, console)
        console.print(f"{name}: {outcome}", highlight=False)
