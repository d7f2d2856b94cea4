"""``visper probe``: what each layer of a model holds of what a teacher sees."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from visper.cli.arguments import parse_path
from visper.common.console import Console

NAME = "probe"


def run(
    model: Annotated[str, typer.Argument(help="a stage's output, a LLaVA folder or a hub id", metavar="MODEL")],
    tasks: Annotated[list[str], typer.Option("--task", help="a task of the recipe that names the teachers; repeat")],
    out: Annotated[Path, typer.Option("--out", "-o", help="the probe's folder", parser=parse_path)],
    images: Annotated[Path, typer.Option(help="folder of images to train the heads on", parser=parse_path)],
    teachers: Annotated[
        str | None, typer.Option(help="recipe or run.yaml whose tasks name the teachers; default: the model's own")
    ] = None,
    rows: Annotated[
        Path | None, typer.Option(help="rows in JSON: only the images that they name", parser=parse_path)
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="train on the first so many images only")] = None,
    score: Annotated[
        list[str] | None,
        typer.Option(help="da-2k, coco-panoptic-val2017, a folder of held-out images, or a quickstart's world; repeat"),
    ] = None,
    score_limit: Annotated[int | None, typer.Option(min=1, help="score on the first so many images only")] = None,
    root: Annotated[Path, typer.Option(help="folder of the data sets that --score names", parser=parse_path)] = Path(
        "data"
    ),
    beside: Annotated[list[Path] | None, typer.Option(help="other probes' folders to draw curves with")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="a change to the probe's run; repeat")] = None,
) -> None:
    """Train one probe for each layer of a frozen model, then score them and draw the curve over layers.

    Repeat the command to go on after an interruption; finished training is kept.

    Example: `visper probe runs/llama3-8b-vit-l/ift --teachers llama3-8b-vit-l/pt --task depth -o probes/ift
    --images data/coco/train2017 --score da-2k`
    """
    from visper.config import load_run
    from visper.evaluation.probe.recipe import ROWS, probe_run, run_of, teacher_targets_of, write_rows

    recipe = run_of(model) if teachers is None else load_run(teachers)
    targets = teacher_targets_of(recipe, tasks, teachers or f"the run of '{model}'")
    prompts = out.parent / f"{out.name}.{ROWS}"
    settings = probe_run(model, out, targets, prompts, images, overrides or [])

    from visper.evaluation.probe.curves import named_apart, read_findings
    from visper.quickstart.probed import require_scorable
    from visper.training import is_finished, run_stage

    for what in score or []:  # hours of training come before the first score
        require_scorable(settings, what, root)
    drawn = named_apart([out, *(beside or [])])
    for place in beside or []:
        read_findings(place)
    finished = is_finished(settings)
    write_rows(images, prompts, rows, limit, fixed=finished)
    if not finished:
        run_stage(settings, resume=True)
    if score:
        _score(out, score, root, score_limit, drawn)


def _score(out: Path, score: list[str], root: Path, limit: int | None, drawn: Mapping[str, Path]) -> None:
    from visper.evaluation.predictions import load_pre_trained
    from visper.evaluation.probe.curves import SCORES, add_findings, draw_curves, findings_table, read_findings
    from visper.quickstart.probed import score_on

    found = load_pre_trained(out)
    findings = [finding for what in score for finding in score_on(found, what, root, limit)]
    add_findings(findings, out / SCORES)
    Console().print(findings_table(findings))
    draw_curves({name: read_findings(place) for name, place in drawn.items()}, out / "curves.svg")
    print(out / SCORES)
    print(out / "curves.svg")
