"""Argument parsing shared by the commands."""

from pathlib import Path

import typer


def parse_path(text: str) -> Path:
    """A path with ``~`` and ``$VARIABLES`` expanded, also where the shell does not expand them (``--images=~/x``)."""
    from visper.config.paths import expand_path  # not at the top: `visper --help` does not need the schema

    try:
        return Path(expand_path(text))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
