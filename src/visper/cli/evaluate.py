"""``visper evaluate``: accuracy on questions or public benchmarks."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from visper.cli.arguments import path_option, require_other_files
from visper.common.console import Console
from visper.common.errors import ConfigError

NAME = "evaluate"
REMEDY = "repeat the command to continue: answers so far are kept"


def run(
    model: Annotated[str, typer.Argument(help="a stage's output, a LLaVA folder or a hub id", metavar="MODEL")],
    questions: Annotated[
        Path | None, path_option(help="JSON, JSONL or Parquet: question, answer[, image, kind, options, id]")
    ] = None,
    images: Annotated[
        Path | None, path_option(help="folder of the image paths; not needed for embedded images")
    ] = None,
    benchmark: Annotated[str | None, typer.Option(help="cv-bench, mmstar, realworldqa, ok-vqa or all")] = None,
    root: Annotated[Path, path_option(help="folder of all data sets, for benchmarks")] = Path("data"),
    protocol: Annotated[str, typer.Option(help="prompts, parsing and metrics of benchmarks: paper")] = "paper",
    limit: Annotated[int | None, typer.Option(min=1, help="maximum number of questions, evenly spaced")] = None,
    answers: Annotated[
        Path | None,
        path_option(help="JSONL file of the raw answers; for benchmarks, a folder; default: in MODEL/answers"),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="questions per batch")] = 32,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="maximum length of an answer, default 32; benchmarks set their own")
    ] = None,
    blind: Annotated[
        bool | None,
        typer.Option(
            "--blind/--no-blind",
            help="also evaluate with the images of other questions; default: only with --questions",
        ),
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="processes that share the questions, one per GPU")] = 1,
) -> None:
    """Score a model on questions, beside the best constant answer and the blind control, or on public benchmarks.

    Raw answers are saved as they are generated: repeat the command to continue after an interruption.

    Example: `visper evaluate visper-quickstart/ift --questions visper-quickstart/world/questions.json
    --images visper-quickstart/world/images`
    """
    _check_options(questions, benchmark, protocol, {"--images": images, "--max-new-tokens": max_new_tokens})
    if questions is not None:
        length, control = max_new_tokens or 32, blind is not False
        _questions(model, questions, images, limit, answers, batch_size, length, control, processes)
    elif benchmark is not None:
        _benchmarks(model, benchmark, root, limit, answers, batch_size, bool(blind), processes)


def _start(processes: int) -> tuple[int, int]:
    """Starts the processes and waits for them, if there are several. Returns this process's share."""
    from visper.config import Launch
    from visper.evaluation.asking import own_share
    from visper.training import start_processes

    started = start_processes(Launch(processes=processes), sys.argv[1:], REMEDY)
    return (0, 1) if started else own_share()  # the started processes have answered; this one scores


def _check_options(
    questions: Path | None, benchmark: str | None, protocol: str, of_questions: Mapping[str, object]
) -> None:
    if (questions is None) == (benchmark is None):
        raise ConfigError("give --questions FILE or --benchmark NAME")
    if protocol != "paper":
        raise ConfigError(f"no protocol '{protocol}': choose paper; lmms-eval's is in docs/evaluation.md")
    given = [name for name, value in of_questions.items() if value is not None] if benchmark else []
    if given:
        raise ConfigError(f"{', '.join(given)}: only for --questions, because a benchmark sets its own; remove it")


def _questions(
    model: str,
    questions: Path,
    images: Path | None,
    limit: int | None,
    answers: Path | None,
    batch_size: int,
    max_new_tokens: int,
    blind: bool,
    processes: int,
) -> None:
    from visper.data.sampler import spread
    from visper.evaluation.asking import Asker, answers_file, require_writable
    from visper.evaluation.question_files import open_questions
    from visper.evaluation.questions import ask_questions
    from visper.evaluation.scores import blind_scores, scores, show_scores

    if answers is not None and answers.is_dir():
        raise ConfigError(f"--answers is '{answers}', a folder: name a file for the answers to --questions")
    asked, source = open_questions(questions, images)
    place = answers or answers_file(model, questions.stem, limit)
    require_other_files({"the file of answers, --answers,": place}, questions)
    require_writable(place, "give another file with --answers FILE.jsonl")
    asker = Asker(model, batch_size, _start(processes))
    own, control = ask_questions(asker, spread(asked, limit), source, place, max_new_tokens, blind)
    if asker.share[1] > 1:
        return
    console = Console()
    show_scores(console, scores(own), blind_scores(control))
    if blind and control is None:
        console.print("no blind control: fewer than two images differ")
    print(f"raw answers: {place}")


def _benchmarks(
    model: str,
    name: str,
    root: Path,
    limit: int | None,
    answers: Path | None,
    batch_size: int,
    blind: bool,
    processes: int,
) -> None:
    from visper.evaluation.asking import Asker, answers_file, require_writable
    from visper.evaluation.benchmarks import find_benchmarks
    from visper.evaluation.benchmarks.base import require_prepared
    from visper.evaluation.benchmarks.run import run_benchmark, save_results, show_results

    chosen = find_benchmarks(name)
    for benchmark in chosen:
        require_prepared(benchmark.name, root)
        require_writable(
            answers_file(model, benchmark.name, limit, answers), "give another folder with --answers FOLDER"
        )
    asker = Asker(model, batch_size, _start(processes))
    results = [run_benchmark(asker, benchmark, root, limit, blind, answers) for benchmark in chosen]
    found = [result for result in results if result is not None]
    if found:
        # Saved first: printing fails if nobody reads to the end, as in `| head`.
        save_results(answers_file(model, name, limit, answers).with_suffix(".scores.json"), found, model)
        show_results(Console(), found)
