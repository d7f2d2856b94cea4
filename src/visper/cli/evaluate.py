"""``visper evaluate``: accuracy on questions."""

from pathlib import Path
from typing import Annotated

import typer

from visper.cli.arguments import parse_path
from visper.common.console import Console

NAME = "evaluate"


def run(
    model: Annotated[str, typer.Argument(help="a stage's output, a LLaVA folder or a hub id", metavar="MODEL")],
    questions: Annotated[
        Path,
        typer.Option(help="JSON, JSONL or Parquet: question, answer[, image, kind, options, id]", parser=parse_path),
    ],
    images: Annotated[
        Path | None, typer.Option(help="folder of the image paths; none for embedded images", parser=parse_path)
    ] = None,
    answers: Annotated[
        Path | None, typer.Option(help="raw answers, JSONL; default: MODEL/answers", parser=parse_path)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="questions asked at once")] = 32,
    max_new_tokens: Annotated[int, typer.Option(help="length of an answer at most")] = 32,
    blind: Annotated[
        bool, typer.Option("--blind/--no-blind", help="ask once more with other questions' images")
    ] = True,
    processes: Annotated[int, typer.Option(min=1, help="on this machine, each with its share, one a GPU")] = 1,
) -> None:
    """Score a model on questions, beside the best constant answer and the blind control.

    Raw answers are kept as they come: the same command goes on where it was interrupted.

    Example: `visper evaluate runs/quickstart/ift --questions world/questions.json --images world/images`
    """
    from visper.config import Launch
    from visper.evaluation.asking import Asker, answers_file, own_share
    from visper.evaluation.question_files import open_questions
    from visper.evaluation.questions import ask_questions
    from visper.evaluation.scores import blind_scores, scores, show_scores
    from visper.training import start_processes

    asked, source = open_questions(questions, images)
    place = answers or answers_file(model, questions.stem)
    command = ["evaluate", model, "--questions", questions, "--answers", place, "--batch-size", batch_size]
    command += ["--max-new-tokens", max_new_tokens, "--blind" if blind else "--no-blind", "--processes", processes]
    command += ["--images", images] if images is not None else []
    share = own_share()
    remedy = "the same command goes on: answers so far are kept"
    if start_processes(Launch(processes=processes), [str(part) for part in command], remedy):
        share = (0, 1)  # they have asked; what is left is to score
    own, control = ask_questions(Asker(model, batch_size, share), asked, source, place, max_new_tokens, blind)
    if share[1] > 1:
        return
    console = Console()
    show_scores(console, scores(own), blind_scores(control))
    if blind and control is None:
        console.print("no blind control: fewer than two images differ")
    print(f"raw answers: {place}")
