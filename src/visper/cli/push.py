"""``visper push``: uploads a finished model to the hub."""

from pathlib import Path
from typing import Annotated

import typer

from visper.cli.arguments import parse_path
from visper.common.console import Console

NAME = "push"


def run(
    model: Annotated[Path, typer.Argument(help="a stage's output, a model folder or an adapter", parser=parse_path)],
    repo: Annotated[str, typer.Argument(help="owner/name on the hub", metavar="REPO")],
    license: Annotated[str, typer.Option(help="the hub's name of the license, for the model card")] = "other",
    base: Annotated[str | None, typer.Option(help="hub id of an adapter's base model")] = None,
    private: Annotated[bool, typer.Option("--private", help="make a new repository private")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list the files without uploading them")] = False,
) -> None:
    """Upload a finished model with its model card, without information about this machine.

    Log in first: `hf auth login`.

    Example: `visper push visper-quickstart/ift someone/my-model --license apache-2.0 --dry-run`
    """
    from visper.model.push import prepare_upload, require_repo, upload

    require_repo(repo)
    console = Console(soft_wrap=True)
    with prepare_upload(model, license, base) as folder:
        for file in sorted(file for file in folder.rglob("*") if file.is_file()):
            console.print(f"{file.stat().st_size / 1e6:10.1f} MB  {file.relative_to(folder)}")
        if dry_run:
            console.print(f"nothing was uploaded: run without --dry-run to upload these files to {repo}")
            return
        console.print(f"uploaded: {upload(folder, repo, private)}")
