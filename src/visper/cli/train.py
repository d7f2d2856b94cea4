"""``visper train``: trains one stage."""

import sys
from typing import Annotated

import typer

NAME = "train"


def run(
    recipe: Annotated[str, typer.Argument(help="a YAML file or a shipped recipe's name", metavar="RUN.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="changes, such as optimization.lr=1e-4")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue from the newest undamaged checkpoint")] = False,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="resume even if rows, images, weights or own code have changed")
    ] = False,
) -> None:
    """Train one stage.

    Example: `visper train llama3-8b-vit-l/pt optimization.micro_batch=8 --resume`
    """
    from visper.common.errors import ConfigError
    from visper.config import load_run

    if accept_changes and not resume:
        raise ConfigError("--accept-changes is for a run that continues: add --resume, or remove it")
    settings = load_run(recipe, overrides or [])

    from visper.evaluation.while_training import evaluator_of
    from visper.planning.recomputation import least_recomputation
    from visper.training import run_stage, start_processes

    if start_processes(settings.launch, sys.argv[1:]):
        return
    evaluator, choose = evaluator_of(settings), least_recomputation
    run_stage(settings, resume=resume, accept_changes=accept_changes, evaluator=evaluator, recomputation=choose)
