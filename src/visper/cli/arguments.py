"""Types that the verbs' arguments share."""

from pathlib import Path

import typer


def parse_path(text: str) -> Path:
    """A path argument with ``~`` and ``$VARIABLES`` expanded, also where the shell leaves them (``--images=~/x``)."""
    from visper.config.paths import expand_path  # not at the top: `visper --help` needs no run's schema

    try:
        return Path(expand_path(text))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
