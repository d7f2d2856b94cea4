"""``visper demo``: a browser page to chat with a model and see what its layers predict."""

from pathlib import Path
from typing import Annotated

import typer

from visper.cli.arguments import PTChanges, path_option

NAME = "demo"


def run(
    model: Annotated[str, typer.Argument(help="a stage's output, a LLaVA folder or a hub id", metavar="MODEL")],
    look: Annotated[
        Path | None, path_option(help="output of the PT whose predictors are drawn; default: MODEL's own")
    ] = None,
    host: Annotated[str, typer.Option(help="address to listen on; 0.0.0.0 lets other machines in")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 7860,
    overrides: PTChanges = None,
) -> None:
    """Serve a page to chat with a model about images and to see what its layers predict.

    Example: `visper demo visper-quickstart/ift --look visper-quickstart/pt`
    """
    from visper.demo.page import serve
    from visper.demo.session import Session

    serve(Session(model, look, overrides or []), host, port)
