"""Answers and drawings during training, for ``run.evaluation``; ``training.held_out`` decides when."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor

from visper.common.cache import key
from visper.common.errors import ConfigError, DataError
from visper.config import Run
from visper.data.sampler import spread
from visper.distillation import Teacher
from visper.evaluation.asking import Prompt, ask_batch, blinded, require_askable
from visper.evaluation.benchmarks import BENCHMARKS
from visper.evaluation.benchmarks.base import Benchmark, Item
from visper.evaluation.benchmarks.run import constant_readings, reading_of
from visper.evaluation.image_sources import ImageSource
from visper.evaluation.predictions import PreTrained
from visper.evaluation.question_files import open_questions
from visper.evaluation.questions import Question, by_content, judge
from visper.evaluation.scores import EVERYTHING, scores
from visper.evaluation.visualize import first_images, look
from visper.model import Student
from visper.training.held_out import Draw, Evaluator
from visper.training.module import TrainingModel

BATCH = 16
Scorer = Callable[[Sequence[str | None]], dict[str, float]]
"""Answers in the order of the questions, None for no answer -> accuracies by name."""


class WhileTraining:
    """Asks the same questions each time, and scores them as ``visper evaluate`` does.

    Args:
        asked: the questions or rows of the prompts, with their right answers.
        blind: also ask each prompt with other prompts' images; the accuracy is the value ``blind``.

    Raises:
        DataError: a prompt is invalid, an image is missing, or ``blind`` has fewer than two different images.
    """

    def __init__(
        self, asked: Sequence[Question | Item], images: ImageSource, max_new_tokens: int, score: Scorer, blind: bool
    ) -> None:
        prompts = [one.prompt if isinstance(one, Question) else one.shown for one in asked]
        require_askable(prompts, images)
        self.digest = key(*map(repr, asked), *(images.digest(name) for own in prompts for name in own.images))
        self._num_seen = len(prompts)
        control = blinded(prompts) if blind else []
        if control is None:
            raise DataError("no other images", "evaluation.blind needs at least two different images: leave it out")
        self.prompts = [*prompts, *control]
        self.images = images
        self.max_new_tokens = max_new_tokens
        self._score = score

    def score(self, said: Sequence[str | None]) -> dict[str, float]:
        """Accuracies of answers in the order of the prompts."""
        own, control = said[: self._num_seen], said[self._num_seen :]
        return {**self._score(own), **({"blind": self._score(control)["accuracy"]} if control else {})}

    def __call__(
        self, student: Student, share: tuple[int, int], generate: Callable[..., Tensor]
    ) -> Mapping[str, float]:
        """Asks this process's share of the prompts. Returns the accuracies over all, the same on every process."""
        own = self.prompts[share[0] :: share[1]]
        said: dict[Prompt, str] = {}
        for batch in (own[start : start + BATCH] for start in range(0, len(own), BATCH)):
            said |= ask_batch(lambda: student, batch, self.images, self.max_new_tokens, generate)
        everything = dict(gather_object(list(said.items()))) if share[1] > 1 else said
        return self.score([everything.get(prompt) for prompt in self.prompts])


def evaluator_of(run: Run) -> Evaluator | None:
    """Builds what asks and draws during a run; None if the run does neither. Errors are raised before training.

    Raises:
        ConfigError: the benchmark is unknown or not prepared, or the limit is too small for its overall score.
        DataError: questions or held-out rows cannot be read, or their images are missing.
    """
    if run.evaluation is None or not (run.evaluation.asks or run.evaluation.draw):
        return None
    asked = _asked(run)
    values = () if asked is None else tuple(asked.score([None] * len(asked.prompts)))
    digest = "" if asked is None else asked.digest
    return Evaluator(asked, _drawn(run) if run.evaluation.draw else None, values, digest)


def _drawn(run: Run) -> Draw:
    """Draws the first images of the held-out rows."""
    assert run.evaluation is not None
    held_out = run.data.model_copy(update={"sources": run.evaluation.loss_on, "drop_list": ()})
    gallery = first_images(held_out)
    if not gallery:
        raise DataError("no images", "no image of evaluation.loss_on can be read, but evaluation.draw needs one")
    count = run.evaluation.draw

    def draw(model: TrainingModel, teachers: Mapping[str, Teacher]) -> dict[str, Image.Image]:
        found = PreTrained(run, model, teachers)
        return {str(number): look(found, image, gallery=gallery) for number, image in enumerate(gallery[:count], 1)}

    return draw


def _asked(run: Run) -> WhileTraining | None:
    """Reads the questions of a run; None if it has none."""
    settings = run.evaluation
    if settings is None or not settings.asks:
        return None
    if settings.questions is not None:
        folder = None if settings.images is None else Path(settings.images)
        all_questions, images = open_questions(Path(settings.questions), folder)
        questions = by_content(spread(all_questions, settings.limit), images)

        def of_questions(said: Sequence[str | None]) -> dict[str, float]:
            table = scores(judge(q, q.images, text) for q, text in zip(questions, said, strict=True))
            kinds = {f"accuracy/{row.kind}": row.accuracy for row in table if row.kind != EVERYTHING}
            return {"accuracy": table[-1].accuracy, "constant": table[-1].constant / table[-1].total, **kinds}

        return WhileTraining(questions, images, settings.max_new_tokens, of_questions, settings.blind)
    if settings.benchmark not in BENCHMARKS:
        known = ", ".join(BENCHMARKS)
        raise ConfigError(f"evaluation.benchmark: no benchmark '{settings.benchmark}': choose one of {known}")
    benchmark = BENCHMARKS[settings.benchmark]
    rows, images = benchmark.rows(Path(run.data.root))
    items = spread(rows, settings.limit)
    score = _scorer(benchmark, items, len(rows))
    return WhileTraining(items, images, benchmark.max_new_tokens, score, settings.blind)


def _scorer(benchmark: Benchmark, items: Sequence[Item], num_rows: int) -> Scorer:
    """Scores answers to some of a benchmark's rows."""

    def columns_of(readings: Sequence[str | None]) -> dict[str, float]:
        values = {column.name: column.value for column in benchmark.score(items, readings)}
        if benchmark.overall not in values:
            raise ConfigError(
                f"evaluation.limit: {len(items)} of the {num_rows} rows of '{benchmark.name}' have the scores "
                f"{', '.join(values)}, but not its accuracy, '{benchmark.overall}': raise the limit (default: 200)"
            )
        return values

    constant = columns_of(constant_readings(benchmark, items))[benchmark.overall]

    def score(said: Sequence[str | None]) -> dict[str, float]:
        both = zip(items, said, strict=True)
        values = columns_of([reading_of(benchmark, item, text).text for item, text in both])
        kinds = {f"accuracy/{name}": value for name, value in values.items()}
        return {"accuracy": values[benchmark.overall], "constant": constant, **kinds}

    return score
