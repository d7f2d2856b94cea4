"""``visper convert``: converts published checkpoints to visper's folders."""

from typing import Annotated

import typer

from visper.common.console import Console
from visper.common.errors import counted

NAME = "convert"


def run(
    source: Annotated[str, typer.Argument(help="a published checkpoint: folder or hub id", metavar="FOLDER_OR_ID")],
    output: Annotated[str, typer.Argument(help="a new folder", metavar="OUT")],
    encoder: Annotated[
        str | None, typer.Option("--encoder", help="folder or hub id of the image encoder; default: the checkpoint's")
    ] = None,
) -> None:
    """Convert a published VisPer-LM or OLA-VLM checkpoint (PT, IFT, probes) to a visper folder.

    Example: `visper convert shi-labs/OLA-VLM-CLIP-ViT-Llama3-8b runs/ola-vlm`
    """
    from visper.published import convert_published

    report = convert_published(source, output, encoder)
    console = Console(soft_wrap=True)
    for folder, count in report.written.items():
        console.print(f"{folder}: {counted(count, 'parameter')}")
    for reason, count in report.left_out.items():
        console.print(f"left out: {count}, {reason}")
    for note in report.notes:
        console.print(f"note: {note}")
    console.print(f"converted: {report.output}")
