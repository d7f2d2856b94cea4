"""The command line, one file per command: each parses its arguments, calls the package and sets the exit code."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated

import typer
from rich.text import Text

import visper
from visper.cli import (
    chat,
    convert,
    data,
    data_check,
    demo,
    evaluate,
    look,
    pipeline,
    plan,
    probe,
    push,
    quickstart,
    recipes,
    study,
    targets,
    train,
)
from visper.common.cache import hub_cache_remedy
from visper.common.console import Console, printable
from visper.common.errors import StoppedError, VisperError
from visper.common.files import remedy_of

DEBUG = "VISPER_DEBUG"
"""Environment variable that `--debug` sets, so that child processes show their tracebacks too."""

app = typer.Typer(
    name="visper",
    help="Train multimodal LLMs that see: visual supervision of their hidden states, defined by recipes.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
for verb in (quickstart, study, train, pipeline, plan, recipes, chat, evaluate, probe, look, demo, convert, push):
    app.command(name=verb.NAME)(verb.run)
data.app.command("check")(data_check.check)
data.app.command("shard")(data_check.shard)
app.add_typer(data.app, name=data.NAME)
app.add_typer(targets.app, name=targets.NAME)


def show_version(wanted: bool) -> None:
    """Prints the version and exits."""
    if wanted:
        print(f"visper {visper.__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of every error")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    """Train multimodal LLMs that see: visual supervision of their hidden states, defined by recipes."""
    if debug:
        os.environ[DEBUG] = "1"


def _leave_group() -> None:
    """Ends the process group, whose threads otherwise sometimes abort the process when Python exits; NCCL warns, too.

    Call it only if every process leaves: a process that others wait for would hang here.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()


def main() -> None:
    """Entry point. An expected error prints one message; anything else is a bug and prints its traceback."""
    try:
        app()
    except SystemExit as ended:
        if not ended.code:
            _leave_group()
        raise
    except (VisperError, OSError) as error:  # OSError: a full disk, a missing file, an unreachable hub
        if os.environ.get(DEBUG):
            traceback.print_exc()
        shared = isinstance(error, VisperError) and error.shared
        if not shared or os.environ.get("RANK", "0") == "0":
            message = str(error)
            if isinstance(error, OSError):
                message += hub_cache_remedy(error) or remedy_of(error)
            name = "stopped" if isinstance(error, StoppedError) else "error"
            Console(stderr=True, soft_wrap=True).print(Text.assemble((f"{name} ", "bold red"), message))
        if shared:
            _leave_group()
        sys.exit(error.exit_code if isinstance(error, VisperError) else VisperError.exit_code)
    except Exception as error:  # noqa: BLE001 - the traceback is printed, with a request to report it
        print(printable(traceback.format_exc(), keep="\n"), file=sys.stderr)
        print(
            f"\nThis is a bug in visper {visper.__version__} ({type(error).__name__}): please report it with the "
            "traceback above, the command and the run.yaml",
            file=sys.stderr,
        )
        sys.exit(1)
