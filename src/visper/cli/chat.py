"""``visper chat``: one question to a trained student."""

from pathlib import Path
from typing import Annotated

import typer

from visper.cli.arguments import parse_path

NAME = "chat"


def run(
    model: Annotated[str, typer.Argument(help="a stage's output, a LLaVA folder or a hub id", metavar="MODEL")],
    prompt: Annotated[str, typer.Option("--prompt", help="the question")],
    image: Annotated[Path | None, typer.Option("--image", help="an image", parser=parse_path)] = None,
    max_new_tokens: Annotated[int, typer.Option(help="length of the answer at most")] = 256,
) -> None:
    """Ask a model about an image.

    Example: `visper chat runs/quickstart/ift --image scene.png --prompt "What is in the image?"`
    """
    from visper.common.console import Console
    from visper.data.images import open_image
    from visper.evaluation import answer, load_to_ask

    shown = open_image(image) if image is not None else None
    said = answer(load_to_ask(model), [prompt], [shown], max_new_tokens)[0]
    Console(soft_wrap=True).print(said, highlight=False)
