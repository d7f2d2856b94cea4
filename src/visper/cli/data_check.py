"""``visper data check`` and ``visper data shard``: check a data set, and write it as a few large files."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from visper.cli.arguments import parse_file, path_option, require_other_files
from visper.common.console import Console
from visper.common.errors import ConfigError, counted

if TYPE_CHECKING:
    from visper.config import Run, Source
    from visper.data.checks.report import Report

_WHAT = "conversations (.json, .jsonl), or a data set: a name of `visper data list` or your own YAML file"
_NAMES = "FILE.json|NAME|FILE.yaml"
What = Annotated[str, typer.Argument(help=_WHAT, metavar=_NAMES, show_default=False)]
Checked = Annotated[
    str | None, typer.Argument(help=f"{_WHAT}; default: all sources of --run", metavar=_NAMES, show_default=False)
]
Images = Annotated[Path | None, path_option("--images", help="folder of a conversation file's image paths")]
Root = Annotated[Path, path_option("--root", help="folder of all data sets")]
DropLists = Annotated[list[Path] | None, path_option("--drop-list", help="file of rows to leave out; repeatable")]


def check(
    what: Checked = None,
    images: Images = None,
    root: Root = Path("data"),
    run: Annotated[str | None, typer.Option("--run", help="a recipe whose tokenizer and limits apply")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="a change to the recipe; repeatable")] = None,
    report: Annotated[Path | None, typer.Option(help="write the counts to this JSON file", parser=parse_file)] = None,
    drop: Annotated[
        Path | None, typer.Option(help="write unusable rows to this file, for data.drop_list", parser=parse_file)
    ] = None,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="re-encode images whose extension is wrong; fetch a data set's missing images"),
    ] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="processes; default: one per core")] = None,
) -> None:
    """Count usable, missing, broken and odd rows and images of each source. Exit code 1: training would drop rows.

    With --run, words that its tokenizer does not know are counted too; more than data.unknown_limit is an error.

    Safe to interrupt and repeat: files that were checked before are not checked again.

    Example: `visper data check llava-665k --root data --report report.json --drop dropped.jsonl`

    Example: `visper data check --run mine.yaml`, every source of a recipe as training reads it
    """
    from visper.data.checks import report as checking
    from visper.data.rows.parts import open_parts
    from visper.data.rows.records import DropList

    console = Console()
    settings = _settings(run, overrides or [])
    sources = _sources(what, images, root, settings)
    require_other_files({"--report": report, "--drop": drop}, what, run, *(source.place for source in sources))
    by = {"encoder": _encoder(settings), "max_pixels": settings.data.max_pixels} if settings is not None else {}

    def look() -> list[checking.Report]:
        opened = zip(sources, open_parts(sources, quiet=False), strict=True)
        return [checking.check(source.place, part, workers=workers, **by) for source, part in opened]

    found = look()
    if repair:
        mended, lost = checking.repair(found, None if what is None or images else _fetch_from(what, root, console))
        rest = f"; {len(lost)} cannot be, first {lost[0].sample_id}: {lost[0].reason}" if lost else ""
        console.print(f"repaired {counted(mended, 'image')}{rest}")
        found = look()
    # Written first: printing fails if nobody reads to the end, as in `| head`.
    if report is not None:
        checking.write_report(found, report)
    drops = DropList(row for part in found for row in part.drops)
    if drop is not None:
        drops.write(drop)
    for part in found:
        _show(part, console)
    if settings is not None:
        _show_unknown(found, settings.data.unknown_limit, console)
    if len(drops):
        raise typer.Exit(1)


def _settings(run: str | None, overrides: list[str]) -> "Run | None":
    from visper.config import load_run

    if run is None and overrides:
        raise ConfigError("--set changes the recipe of --run: name it, or remove --set")
    return load_run(run, overrides) if run is not None else None


def _show_unknown(found: "list[Report]", limit: float, console: Console) -> None:
    from visper.data.checks.unknown_words import total_of

    unknown = total_of([part.unknown for part in found])
    if unknown.num_unknown:
        console.print(unknown.check(limit) or str(unknown), highlight=False)


def _sources(what: str | None, images: Path | None, root: Path, settings: "Run | None") -> "list[Source]":
    from visper.data.rows.parts import json_source
    from visper.data.sets.catalog import row_files, sources_of

    if what is not None:
        of_run = settings.data.sources if settings is not None else ()
        return [json_source(*pair, of_run) for pair in sources_of(what, images, root, whole=False)]
    if settings is None or images is not None:
        raise ConfigError("give conversations or a data set, or only --run, to check every source of that recipe")
    return row_files(settings.data, whole=False)


def _show(report: "Report", console: Console) -> None:
    from visper.data.checks.report import summary

    for table in report.tables(console.width):
        console.print(table)
    first = {drop.reason: drop.detail for drop in reversed(list(report.drops))}
    for reason in report.drops.counts():
        console.print(f"{reason}: {', '.join(report.examples[reason])}", style="dim", highlight=False)
        console.print(f"    the first: {first[reason]}", style="dim", highlight=False)
    for warning in report.warnings:
        console.print(f"warning: {warning}", highlight=False)
    console.print(f"{report.file.name}: {summary(report)}")


def shard(
    what: What,
    out: Annotated[Path, path_option("--out", help="a new folder")],
    images: Images = None,
    root: Root = Path("data"),
    drop_list: DropLists = None,
    file_mb: Annotated[int, typer.Option(min=1, help="approximate size of the images in a file, in MiB")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="seed of the order of the rows")] = 0,
) -> None:
    """Write a data set as a few shuffled Parquet files; train with `data.sources=[{parquet: FOLDER/*.parquet}]`.

    Example: `visper data shard llava-665k --root data --out shards/mix665k`
    """
    from visper.config import Data
    from visper.data.checks.unread_images import unread_images
    from visper.data.rows.parquet import write_parquet
    from visper.data.rows.records import DropList
    from visper.data.rows.sources import open_records
    from visper.data.sets.catalog import sources_of

    drops = DropList(agreed=(row for path in drop_list or [] for row in DropList.read(path)))
    records = open_records(sources_of(what, images, root), drops, quiet=False)
    for warning in unread_images(records):
        Console().print(f"warning: {warning}", highlight=False)
    limit = Data.model_fields["drop_limit"].default
    counts = write_parquet(records, out, drops, file_mb << 20, seed, quiet=False, drop_limit=limit)
    Console().print(
        f"{counted(sum(counts), 'row')} in {counted(len(counts), 'file')}: {out}; left out: {drops.counts() or 0}"
    )


def _fetch_from(name: str, root: Path, console: Console) -> Callable[[list[Path]], None]:
    """A function that downloads files under ``root`` again, as `visper data prepare` does."""
    from visper.data.sets.prepare import prepare

    def fetch(files: list[Path]) -> None:
        again = {file.relative_to(root).as_posix() for file in files if file.is_relative_to(root)}
        console.print(f"{name}: {prepare(name, root, console=console, again=again)}", highlight=False)

    return fetch


def _encoder(settings):  # type: ignore[no-untyped-def]
    from visper.data.vlm import encoder_for
    from visper.model.start import starting_processor

    return encoder_for(starting_processor(settings), settings.data.max_tokens)
