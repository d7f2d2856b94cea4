"""``visper probe``: measures how well each layer of a model predicts a teacher's output."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from visper.cli.arguments import parse_file, path_option, require_other_files
from visper.common.console import Console
from visper.common.errors import ConfigError
from visper.common.lock import locked

if TYPE_CHECKING:
    from visper.config import Run

NAME = "probe"
REMEDY = "repeat the command to continue from the last checkpoint"


def run(
    model: Annotated[str, typer.Argument(help="a stage's output, a model's folder or a hub id", metavar="MODEL")],
    tasks: Annotated[list[str], typer.Option("--task", help="a task of the recipe given by --teachers; repeatable")],
    out: Annotated[Path, path_option("--out", "-o", help="the probe's folder")],
    images: Annotated[Path, path_option(help="folder of images to train the heads on")],
    teachers: Annotated[
        str | None, typer.Option(help="recipe or run.yaml whose tasks name the teachers; default: the model's own")
    ] = None,
    rows: Annotated[Path | None, path_option(help="JSON rows; train only on the images that they name")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="train only on N images, evenly spaced", metavar="N")] = None,
    score: Annotated[
        list[str] | None,
        typer.Option(
            help="da-2k, coco-panoptic-val2017, a folder of held-out images, or a quickstart's world; repeatable"
        ),
    ] = None,
    score_limit: Annotated[
        int | None, typer.Option(min=1, help="score only on N images, evenly spaced", metavar="N")
    ] = None,
    root: Annotated[Path, path_option(help="folder of the data sets that --score names")] = Path("data"),
    beside: Annotated[list[Path] | None, path_option(help="folder of another probe to draw; repeatable")] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="file of the curves, .svg, .png or .pdf; default: curves.svg in --out", parser=parse_file),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="a change to the probe's run; repeatable")
    ] = None,
) -> None:
    """Train one probe for each layer of a frozen model, then score them and draw the curve over layers.

    Repeat the command to continue after an interruption; finished training is kept.

    Example: `visper probe runs/llama3-8b-vit-l/ift --teachers llama3-8b-vit-l/pt --task depth -o probes/ift
    --images data/coco/train2017 --score da-2k`
    """
    from visper.evaluation.probe.curves import draw_curves, named_apart, read_findings
    from visper.evaluation.probe.recipe import rows_file

    if score_limit is not None and not score:
        raise ConfigError("--score-limit is for --score, which is missing")
    draws, plot = bool(score or beside or plot), plot or out / "curves.svg"
    recipe = out.parent / f"{out.name}.probe.yaml"
    written = {"--plot": plot if draws else None, "the probe's recipe": recipe, "the probe's rows": rows_file(out)}
    require_other_files(written, teachers, rows)
    drawn = named_apart([out, *(beside or [])])
    settings = _settings(model, teachers, tasks, out, images, overrides or [])
    _check(settings, out, score or [], root, beside or [], plot if draws else None)
    # Rows and recipe lie beside ``out``, where the lock that training holds does not protect them.
    with locked(out.parent / f".{out.name}.lock", Console()):
        if not _write_rows(settings, out, images, rows, limit, score or [], root, score_limit):
            _train(settings, recipe, followed=draws)
    if score:
        _score(out, score, root, score_limit)
    if draws:
        draw_curves({name: read_findings(place) for name, place in drawn.items()}, plot)
        print(plot)


def _settings(
    model: str, teachers: str | None, tasks: list[str], out: Path, images: Path, overrides: list[str]
) -> "Run":
    from visper.config import load_run
    from visper.evaluation.probe.recipe import probe_run, rows_file, run_of, teacher_targets_of

    recipe = run_of(model) if teachers is None else load_run(teachers)
    targets = teacher_targets_of(recipe, tasks, teachers or f"the run of '{model}'")
    return probe_run(model, out, targets, rows_file(out), images, overrides)


def _check(settings: "Run", out: Path, score: list[str], root: Path, beside: list[Path], plot: Path | None) -> None:
    """Checks everything that scoring and drawing need, because training takes hours before they start."""
    from visper.evaluation.probe.curves import SCORES, read_findings, require_drawable
    from visper.quickstart.probed import require_scorable

    for what in score:
        require_scorable(settings, what, root)
    if plot is not None and not score:
        if not (out / SCORES).is_file():
            raise ConfigError(f"the probe in '{out}' has no scores to draw: add --score, see `visper probe --help`")
        beside = [out, *beside]
    for place in beside:
        read_findings(place)
    if plot is not None:
        require_drawable(plot)


def _write_rows(
    settings: "Run",
    out: Path,
    images: Path,
    rows: Path | None,
    limit: int | None,
    score: list[str],
    root: Path,
    score_limit: int | None,
) -> bool:
    """Writes the rows to train on, none of which may be scored on.

    Returns whether the probe is finished; then its rows may not change.
    """
    from visper.evaluation.probe.recipe import rows_file, write_rows
    from visper.quickstart.probed import require_apart
    from visper.training import is_finished

    finished = is_finished(settings)
    write_rows(images, rows_file(out), rows, limit, fixed=finished)
    for what in score:
        require_apart(rows_file(out), images, what, root, score_limit)
    return finished


def _train(settings: "Run", recipe: Path, followed: bool) -> None:
    from visper.common.files import write_text
    from visper.config import run_text
    from visper.training import run_stage, start_processes

    write_text(recipe, run_text(settings))
    if not start_processes(settings.launch, ["train", str(recipe), "--resume"], REMEDY):
        run_stage(settings, resume=True, followed=followed)


def _score(out: Path, score: list[str], root: Path, limit: int | None) -> None:
    from visper.evaluation.predictions import load_pre_trained
    from visper.evaluation.probe.curves import SCORES, add_findings, findings_table
    from visper.quickstart.probed import score_on

    found = load_pre_trained(out)
    findings = [finding for what in score for finding in score_on(found, what, root, limit)]
    add_findings(findings, out / SCORES)
    Console().print(findings_table(findings))
    print(out / SCORES)
