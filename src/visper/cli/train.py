"""``visper train``: one stage."""

from typing import Annotated

import typer

NAME = "train"


def run(
    recipe: Annotated[str, typer.Argument(help="a YAML file or a shipped recipe's name", metavar="RUN.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="changes, such as optimization.lr=1e-4")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue from the newest complete checkpoint")] = False,
) -> None:
    """Train one stage.

    Example: `visper train llama3-8b-vit-l/pt optimization.micro_batch=8 --resume`
    """
    from visper.config import load_run

    settings = load_run(recipe, overrides or [])

    from visper.training import run_stage, start_processes

    if start_processes(settings.launch, ["train", recipe, *(overrides or []), *(["--resume"] if resume else [])]):
        return
    run_stage(settings, resume=resume)
