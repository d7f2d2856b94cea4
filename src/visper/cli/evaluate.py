"""``visper evaluate``: exact-match accuracy on a file of questions."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

NAME = "evaluate"


def run(
    model: Annotated[str, typer.Argument(help="a stage's output, a LLaVA folder or a hub id", metavar="MODEL")],
    questions: Annotated[Path, typer.Option(help="JSON list of {image, question, answer[, kind]}")],
    images: Annotated[Path, typer.Option(help="folder of the image paths")],
    answers: Annotated[Path | None, typer.Option(help="raw answers, JSONL; default: beside the questions")] = None,
    batch_size: Annotated[int, typer.Option(help="questions asked at once")] = 32,
    max_new_tokens: Annotated[int, typer.Option(help="length of an answer at most")] = 32,
    shuffle_images: Annotated[bool, typer.Option(help="another question's picture each: the blind control")] = False,
) -> None:
    """Score a model on questions, with Wilson intervals; raw answers are kept.

    Example: `visper evaluate runs/quickstart/ift --questions world/questions.json --images world`
    """
    from visper.evaluation.questions import evaluate, read_questions, save_answers, scores, show_scores
    from visper.model import load_student

    asked = read_questions(questions)
    answered = evaluate(load_student(model), asked, images, batch_size, max_new_tokens, shuffle_images)
    place = answers or questions.with_name(f"{questions.stem}.answers.jsonl")
    save_answers(place, answered)
    show_scores(Console(), scores(answered))
    print(f"raw answers: {place}")
