"""``visper pipeline``: trains several stages in order."""

import sys
from typing import Annotated

import typer

NAME = "pipeline"
REMEDY = "repeat the command: finished stages are skipped and interrupted ones continued"


def run(
    recipes: Annotated[list[str], typer.Argument(help="the stages, in order", metavar="RUN.yaml ...")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="a change to every stage, such as seed=1; repeatable")
    ] = None,
) -> None:
    """Train stages in order. Finished stages are skipped and interrupted ones continued, so it is safe to repeat.

    Example: `visper pipeline llama3-8b-vit-l/pt llama3-8b-vit-l/ift --set seed=1`
    """
    from visper.common.errors import ConfigError
    from visper.config import load_run

    runs = [load_run(recipe, overrides or []) for recipe in recipes]

    from visper.evaluation.while_training import evaluator_of
    from visper.planning.recomputation import least_recomputation
    from visper.training import run_pipeline, start_processes
    from visper.training.output import require_separate_outputs

    require_separate_outputs(runs)
    if len({settings.launch.processes for settings in runs}) > 1:
        raise ConfigError("stages of a pipeline have different launch.processes: give --set launch.processes=N")
    if start_processes(runs[0].launch, sys.argv[1:], REMEDY):
        return
    run_pipeline(runs, evaluator_of, least_recomputation)
