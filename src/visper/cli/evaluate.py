"""``visper evaluate``: exact-match accuracy on a file of questions."""

from pathlib import Path
from typing import Annotated

import typer

from visper.cli.arguments import parse_path
from visper.common.console import Console

NAME = "evaluate"


def run(
    model: Annotated[str, typer.Argument(help="a stage's output, a LLaVA folder or a hub id", metavar="MODEL")],
    questions: Annotated[Path, typer.Option(help="JSON list of {image, question, answer[, kind]}", parser=parse_path)],
    images: Annotated[Path, typer.Option(help="folder of the image paths", parser=parse_path)],
    answers: Annotated[
        Path | None, typer.Option(help="raw answers, JSONL; default: MODEL/answers", parser=parse_path)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="questions asked at once")] = 32,
    max_new_tokens: Annotated[int, typer.Option(help="length of an answer at most")] = 32,
    shuffle_images: Annotated[bool, typer.Option(help="another question's image each: the blind control")] = False,
) -> None:
    """Score a model on questions, with Wilson intervals; raw answers are kept.

    Example: `visper evaluate runs/quickstart/ift --questions world/questions.json --images world`
    """
    from visper.evaluation import load_to_ask
    from visper.evaluation.questions import answers_file, evaluate, read_questions, save_answers, scores, show_scores

    asked = read_questions(questions)
    place = answers or answers_file(model, questions, shuffle_images)
    answered = evaluate(load_to_ask(model), asked, images, batch_size, max_new_tokens, shuffle_images)
    save_answers(place, answered)
    show_scores(Console(), scores(answered))
    print(f"raw answers: {place}")
