"""The command line: one file per verb. Each parses, calls one function and gives an exit code."""

from __future__ import annotations

import sys

import typer
from rich.console import Console
from rich.text import Text

from visper.cli import (
    chat,
    convert,
    data,
    data_check,
    evaluate,
    look,
    pipeline,
    plan,
    quickstart,
    recipes,
    targets,
    train,
)

app = typer.Typer(
    name="visper",
    help="Train multimodal LLMs that see: PT with visual embedding distillation, VPT, IFT, and what comes after.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
for verb in (quickstart, train, pipeline, plan, recipes, chat, evaluate, look, convert):
    app.command(name=verb.NAME)(verb.run)
data.app.command("check")(data_check.check)
data.app.command("shard")(data_check.shard)
app.add_typer(data.app, name=data.NAME)
app.add_typer(targets.app, name=targets.NAME)


def main() -> None:
    """Entry point: what a person can mend is one message and exit code 2; anything else is a bug and a traceback."""
    try:
        app()
    except ExpectedErrors as error:
        Console(stderr=True, soft_wrap=True).print(Text.assemble(("error ", "bold red"), str(error)))
        sys.exit(2)
    except Exception as error:
        # A run that was stopped says with which code; to ask for its class would import torch for every verb.
        code = getattr(error, "exit_code", None)
        if code is None:
            raise
        Console(stderr=True, soft_wrap=True).print(Text.assemble(("stopped ", "bold"), str(error)))
        sys.exit(code)


ExpectedErrors = (ValueError, OSError, ArithmeticError)
"""ConfigError, DataError and the library's own ValueErrors, a full disk, a loss that is not finite: they say it all."""
