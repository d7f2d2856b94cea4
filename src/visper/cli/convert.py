"""``visper convert``: published checkpoints to ours and back."""

from enum import Enum
from typing import Annotated

import typer
from rich.console import Console

NAME = "convert"


class Form(str, Enum):
    """Whose folder is written."""

    OURS = "ours"
    PUBLISHED = "published"


def run(
    source: Annotated[str, typer.Argument(help="a published checkpoint: folder or hub id", metavar="FOLDER_OR_ID")],
    output: Annotated[str, typer.Argument(help="a new folder", metavar="OUT")],
    to: Annotated[Form, typer.Option("--to", help="'published': the other way, from a stage's output")] = Form.OURS,
    encoder: Annotated[
        str | None, typer.Option("--encoder", help="folder or hub id of the image encoder; default: the checkpoint's")
    ] = None,
) -> None:
    """Convert a published VisPer-LM or OLA-VLM checkpoint (PT, IFT, probes) to a folder of ours, or back.

    Example: `visper convert shi-labs/OLA-VLM-CLIP-ViT-Llama3-8b runs/ola-vlm`
    """
    from visper.published import convert_published, convert_to_published

    report = (convert_published if to is Form.OURS else convert_to_published)(source, output, encoder)
    console = Console(soft_wrap=True)
    for folder, count in report.written.items():
        console.print(f"{folder}: {count} parameters")
    for reason, count in report.left_out.items():
        console.print(f"left out: {count}, {reason}")
    for note in report.notes:
        console.print(f"note: {note}")
    console.print(f"converted: {report.output}")
