"""Argument parsing shared by the commands."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from visper.common.errors import ConfigError

PICTURES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""Suffix of a drawing's file -> Pillow's name of its format."""

PTChanges = Annotated[
    list[str] | None, typer.Option("--set", help="a change to PT's run, such as a teacher's path; repeatable")
]
"""Overrides of the run of a PT."""


def parse_path(text: str) -> Path:
    """A path with ``~`` and ``$VARIABLES`` expanded, also where the shell does not expand them (``--images=~/x``)."""
    from visper.config.paths import expand_path  # not at the top: `visper --help` does not need the schema

    try:
        return Path(expand_path(text))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def path_option(*names: str, help: str) -> Any:
    """An option that is a path."""
    return typer.Option(*names, help=help, parser=parse_path)


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


def require_other_files(outputs: Mapping[str, Path | None], *inputs: str | Path | None) -> None:
    """Checks that no file to be written is one that the command reads, also through a link, or another output.

    Args:
        outputs: option, or another name of the output -> its file.
        inputs: files; None, folders, and names that are no files are ignored.

    Raises:
        ConfigError: an input or another output would be overwritten.
    """
    read = [Path(name) for name in inputs if name is not None and Path(name).is_file()]
    given = {name: place for name, place in outputs.items() if place is not None}
    taken: dict[Path, str] = {}
    for name, place in given.items():
        if place.exists() and any(place.samefile(file) for file in read):
            raise ConfigError(f"{name} is '{place}', which this command reads and would overwrite: name another file")
        other = taken.setdefault(place.resolve(), name)
        if other != name:
            raise ConfigError(f"{name} is '{place}', the same file as {other}: name another file")
