"""``visper data check`` and ``visper data shard``: what a data set holds, and the same in a few large files."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

File = Annotated[Path, typer.Argument(help="conversations, .json or .jsonl", metavar="FILE.json", show_default=False)]
Images = Annotated[Path, typer.Option("--images", help="folder under which the image paths lie")]
DropLists = Annotated[list[Path] | None, typer.Option("--drop-list", help="rows to leave out; repeat as needed")]


def check(
    file: File,
    images: Images,
    run: Annotated[
        str | None, typer.Option("--run", help="a recipe, by whose tokenizer and max_tokens supervision is checked")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="a change to the recipe; repeat")] = None,
    report: Annotated[Path | None, typer.Option(help="write the counts here, as JSON")] = None,
    drop: Annotated[Path | None, typer.Option(help="write the unusable rows here, for a run's data.drop_list")] = None,
    repair: Annotated[bool, typer.Option("--repair", help="re-encode images whose name tells another format")] = False,
    workers: Annotated[int | None, typer.Option(help="processes; default: one a core")] = None,
) -> None:
    """Count what is there, missing, broken and odd, per source. Exit code 1: rows that training would leave out.

    Safe to interrupt and repeat: files looked at before are not looked at again.

    Example: `visper data check llava_v1_5_mix665k.json --images data --report report.json --drop dropped.jsonl`
    """
    from visper.data import check as checking

    console = Console()
    encoder = _encoder(run, overrides or []) if run is not None else None
    found = checking.check(file, images, encoder, workers=workers)
    if repair:
        mended, lost = checking.repair(found)
        console.print(f"mended {mended} images; {len(lost)} must be fetched again (`visper data prepare`)")
        found = checking.check(file, images, encoder, workers=workers)
    console.print(found.table())
    for reason in found.drops.counts():
        console.print(f"{reason}: {', '.join(found.examples[reason])}", style="dim", markup=False, highlight=False)
    if report is not None:
        found.write(report)
    if drop is not None:
        found.drops.write(drop)
    console.print(checking.summary(found), markup=False)
    if len(found.drops):
        raise typer.Exit(1)


def shard(
    file: File,
    images: Images,
    out: Annotated[Path, typer.Option("--out", help="a new folder")],
    drop_list: DropLists = None,
    shard_mb: Annotated[int, typer.Option(help="size of a shard, MiB; give every process several")] = 256,
    seed: Annotated[int, typer.Option(help="of the order in which rows are written")] = 0,
) -> None:
    """Write a data set as Parquet shards, shuffled; train from them by `data.sources=[{shards: FOLDER_OR_ADDRESS}]`.

    Example: `visper data shard llava_v1_5_mix665k.json --images data --out shards/mix665k --shard-mb 256`
    """
    from visper.data.records import DropList
    from visper.data.shards import write_shards
    from visper.data.sources import open_records

    drops = DropList(agreed=(row for path in drop_list or [] for row in DropList.read(path)))
    records = open_records([(file, images)], drops, quiet=False)
    shards = write_shards(records, out, drops, shard_mb << 20, seed, quiet=False)
    Console().print(
        f"{sum(shard.rows for shard in shards):,} rows in {len(shards)} shards: {out}; left out: {drops.counts() or 0}"
    )


def _encoder(recipe: str, overrides: list[str]):  # type: ignore[no-untyped-def]
    from visper.config import load_run
    from visper.data.chat import ConversationEncoder
    from visper.training.run import starting_processor

    settings = load_run(recipe, overrides)
    return ConversationEncoder(starting_processor(settings), settings.data.max_tokens)
