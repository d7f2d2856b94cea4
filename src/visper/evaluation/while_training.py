"""Answers of a model that is being trained, for ``run.evaluation``; ``training.held_out`` decides when."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from accelerate.utils import gather_object
from torch import Tensor

from visper.common.errors import ConfigError
from visper.config import Run
from visper.data.sampler import spread
from visper.evaluation.ask import answer
from visper.evaluation.asking import Prompt, open_images, require_askable
from visper.evaluation.benchmarks import BENCHMARKS
from visper.evaluation.benchmarks.run import reading_of
from visper.evaluation.image_sources import ImageSource
from visper.evaluation.question_files import open_questions
from visper.evaluation.questions import judge
from visper.evaluation.scores import EVERYTHING, scores
from visper.model import Student

BATCH = 16
Scorer = Callable[[Sequence[str | None]], dict[str, float]]
"""Answers in the questions' order, None where there is none -> accuracies by name."""


class WhileTraining:
    """Asks the same questions each time, and scores them as ``visper evaluate`` does.

    Args:
        prompts: what is asked.
        images: where their images are.
        max_new_tokens: of an answer.
        score: of all answers.
    """

    def __init__(self, prompts: Sequence[Prompt], images: ImageSource, max_new_tokens: int, score: Scorer) -> None:
        require_askable(prompts, images)
        self.prompts = list(prompts)
        self.images = images
        self.max_new_tokens = max_new_tokens
        self.score = score

    def __call__(
        self, student: Student, share: tuple[int, int], generate: Callable[..., Tensor]
    ) -> Mapping[str, float]:
        """Accuracies over the questions, of which this process asks its share, the same on all processes."""
        own = list(range(len(self.prompts)))[share[0] :: share[1]]
        said: list[tuple[int, str]] = []
        for batch in (own[start : start + BATCH] for start in range(0, len(own), BATCH)):
            opened = {at: open_images(self.images, self.prompts[at].images) for at in batch}
            shown = {at: images for at, images in opened.items() if images is not None}
            if shown:
                texts = [self.prompts[at].text for at in shown]
                found = answer(student, texts, list(shown.values()), self.max_new_tokens, generate)
                said += zip(shown, found, strict=True)
        everything = dict(gather_object(said) if share[1] > 1 else said)
        return self.score([everything.get(at) for at in range(len(self.prompts))])


def answers_while_training(run: Run) -> WhileTraining | None:
    """What a run asks while it trains; None where it asks nothing. Reads the questions, so faults show before training.

    Raises:
        ConfigError: an unknown benchmark, or one that is not prepared.
        DataError: questions that cannot be read, or whose images are not there.
    """
    settings = run.evaluation
    if settings is None or not settings.asks:
        return None
    if settings.questions is not None:
        folder = None if settings.images is None else Path(settings.images)
        all_questions, images = open_questions(Path(settings.questions), folder)
        questions = spread(all_questions, settings.limit)

        def of_questions(said: Sequence[str | None]) -> dict[str, float]:
            table = scores(judge(q, q.images, text) for q, text in zip(questions, said, strict=True))
            kinds = {f"accuracy/{row.kind}": row.accuracy for row in table if row.kind != EVERYTHING}
            return {"accuracy": table[-1].accuracy, "constant": table[-1].constant / table[-1].total, **kinds}

        prompts = [question.prompt(question.images) for question in questions]
        return WhileTraining(prompts, images, settings.max_new_tokens, of_questions)
    if settings.benchmark not in BENCHMARKS:
        known = ", ".join(BENCHMARKS)
        raise ConfigError(f"evaluation.benchmark: no benchmark '{settings.benchmark}', there are {known}")
    benchmark = BENCHMARKS[settings.benchmark]
    rows, images = benchmark.rows(Path(run.data.root))
    items = spread(rows, settings.limit)

    def of_benchmark(said: Sequence[str | None]) -> dict[str, float]:
        both = zip(items, said, strict=True)
        columns = benchmark.score(items, [reading_of(benchmark, item, text).text for item, text in both])
        return {"accuracy": columns[-1].value, **{f"accuracy/{column.name}": column.value for column in columns}}

    prompts = [Prompt(item.id, item.prompt, item.images) for item in items]
    return WhileTraining(prompts, images, benchmark.max_new_tokens, of_benchmark)
