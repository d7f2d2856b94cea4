"""``visper look``: what the layers of a pre-trained student see in an image."""

from pathlib import Path
from typing import Annotated

import typer

from visper.cli.arguments import parse_path

NAME = "look"


def run(
    model: Annotated[Path, typer.Argument(help="the output of a finished PT", metavar="MODEL", parser=parse_path)],
    image: Annotated[Path, typer.Option("--image", help="an image", parser=parse_path)],
    out: Annotated[Path, typer.Option("--out", "-o", help="the PNG to write", parser=parse_path)],
    prompt: Annotated[str | None, typer.Option(help="asked beside the image")] = None,
    gallery: Annotated[
        Path | None,
        typer.Option(help="to show the nearest of, where a teacher draws none; default: the run's own"),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="a change to its run, such as a teacher's place; repeat as needed"),
    ] = None,
) -> None:
    """Draw every tapped layer's prediction beside the teacher's own output.

    Example: `visper look runs/quickstart/pt --image scene.png -o seen.png`
    """
    from visper.common.files import atomic_path
    from visper.data.images import open_image
    from visper.evaluation.predictions import load_pre_trained
    from visper.evaluation.visualize import PROMPT, folder_gallery, look, needs_gallery, run_gallery

    shown = open_image(image)
    found = load_pre_trained(model, overrides or [])
    others = []
    if needs_gallery(found):
        others = folder_gallery(gallery) if gallery is not None else run_gallery(found.run)
    sheet = look(found, shown, prompt or PROMPT, others)
    with atomic_path(out) as partial:
        sheet.save(partial, "PNG")
    print(out)
