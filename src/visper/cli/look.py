"""``visper look``: draws what the layers of a pre-trained student predict for an image."""

from pathlib import Path
from typing import Annotated

import typer

from visper.cli.arguments import PICTURES, PTChanges, parse_path, parse_picture, path_option, require_other_files

NAME = "look"


def run(
    model: Annotated[
        Path,
        typer.Argument(
            help="the output of a stage with 'distillation', usually PT; with --predictors, of a later one",
            metavar="MODEL",
            parser=parse_path,
        ),
    ],
    image: Annotated[Path, path_option("--image", help="an image")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="the drawing to write, .png, .jpg or .webp", parser=parse_picture)
    ],
    predictors: Annotated[
        Path | None, path_option(help="draw MODEL, a later stage, with the predictors of this PT")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="text that goes with the image")] = None,
    gallery: Annotated[
        Path | None,
        path_option(help="images to show the nearest of if a teacher cannot draw; default: images of the run"),
    ] = None,
    overrides: PTChanges = None,
) -> None:
    """Draw every tapped layer's prediction beside the teacher's own output.

    Example: `visper look visper-quickstart/pt --image scene.png -o seen.png`
    """
    from visper.common.files import atomic_path
    from visper.data.images import open_image
    from visper.evaluation.ask import load_to_ask
    from visper.evaluation.contact_sheet import with_note
    from visper.evaluation.predictions import load_pre_trained, other_weights_note
    from visper.evaluation.visualize import PROMPT, first_images, folder_gallery, look, needs_gallery

    require_other_files({"--out": out}, image)
    shown = open_image(image)
    note = None if predictors is None else other_weights_note(predictors, model)
    student = None if note is None else load_to_ask(model)
    found = load_pre_trained(predictors or model, overrides or [], student)
    others = []
    if needs_gallery(found):
        others = folder_gallery(gallery) if gallery is not None else first_images(found.run.data)
    sheet = look(found, shown, prompt or PROMPT, others)
    if note is not None:
        sheet = with_note(sheet, note)
        print(note)
    with atomic_path(out) as partial:
        sheet.save(partial, PICTURES[out.suffix.lower()], quality=95)  # PNG has no quality and ignores it
    print(out)
