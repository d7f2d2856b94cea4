"""Argument parsing shared by the commands."""

from pathlib import Path

import typer

PICTURES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""Suffix of a drawing's file -> Pillow's name of its format."""


def parse_path(text: str) -> Path:
    """A path with ``~`` and ``$VARIABLES`` expanded, also where the shell does not expand them (``--images=~/x``)."""
    from visper.config.paths import expand_path  # not at the top: `visper --help` does not need the schema

    try:
        return Path(expand_path(text))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def parse_file(text: str) -> Path:
    """``parse_path`` of a file to be written, which must not be an existing folder."""
    path = parse_path(text)
    if path.is_dir():
        raise typer.BadParameter(f"'{path}' is a folder: name a file")
    return path


def parse_picture(text: str) -> Path:
    """``parse_file`` of a drawing, whose suffix names its format."""
    path = parse_file(text)
    if path.suffix.lower() not in PICTURES:
        raise typer.BadParameter(f"'{path}' names no format for a drawing: end it with {', '.join(PICTURES)}")
    return path
