"""``visper chat``: one question to a trained student."""

from pathlib import Path
from typing import Annotated

import typer

from visper.cli.arguments import path_option
from visper.common.errors import ConfigError, DataError

NAME = "chat"


def run(
    model: Annotated[str, typer.Argument(help="a stage's output, a LLaVA folder or a hub id", metavar="MODEL")],
    prompt: Annotated[str, typer.Option("--prompt", help="the question")],
    images: Annotated[
        list[Path] | None,
        path_option("--image", help="an image; several go to the `<image>` tags of the question in order"),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="maximum length of the answer")] = 256,
) -> None:
    """Ask a model about one or several images.

    Example: `visper chat visper-quickstart/ift --image scene.png --prompt "What is in the picture ?"`
    """
    from visper.common.console import Console
    from visper.data.images import open_image
    from visper.evaluation import answer, load_to_ask

    shown = [open_image(image) for image in images or []]
    _check(prompt, images or [])  # before the model is loaded
    if not shown:
        Console(stderr=True).print("no --image: the model answers from the text alone", style="dim")
    said = answer(load_to_ask(model), [prompt], [shown], max_new_tokens)[0]
    if said is None:
        raise DataError("too long", "the prompt and its images leave no room for an answer: shorten --prompt")
    Console(soft_wrap=True).print(said, highlight=False)


def _check(prompt: str, images: list[Path]) -> None:
    from visper.data.rows.formats import IMAGE_TAG
    from visper.evaluation.ask import as_row

    if not prompt.strip():
        raise ConfigError("--prompt is empty: write a question")
    try:
        as_row(prompt, [image.name for image in images])
    except DataError as error:
        remedy = f"; give one --image FILE for each '{IMAGE_TAG}' of the prompt" if IMAGE_TAG in prompt else ""
        raise DataError(error.reason, error.detail + remedy) from error
