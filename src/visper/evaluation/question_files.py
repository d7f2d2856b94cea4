"""Reads files of questions: JSON, JSONL or Parquet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from visper.common.errors import ConfigError, DataError
from visper.data.rows.formats import unread_image
from visper.data.rows.hugging_face import holds_images
from visper.data.rows.json_rows import is_json_name, read_rows
from visper.evaluation.choices import LETTERS, plain
from visper.evaluation.image_sources import ImageFolder, ImageSource, TableImages, read_table
from visper.evaluation.questions import EVERYTHING, Question

NEEDED = ("question", "answer")
OPTIONAL = ("image", "kind", "options", "id")
ALIKE = {"image": ("images", "img", "image_path"), "options": ("choices",)}
"""Names of columns in other tools' files for what is read under an optional column's name."""


def read_questions(path: Path) -> list[Question]:
    """Reads a JSON or JSONL file. Rows have ``question`` and ``answer``, optionally ``image``, ``kind``, ``options``
    and ``id``.

    ``answer`` is a text, a number, or a list of accepted ones; ``image`` is a path or a list of paths. Several images
    take the places of the question's ``<image>`` tags. With ``options``, a list of texts, ``answer`` is the letter
    ("B") or the text of one of them.

    Raises:
        DataError: the file or a question is not of this form; the message names the question.
    """
    return _questions(path, read_rows(path))


def open_questions(path: Path, images: Path | None) -> tuple[list[Question], ImageSource]:
    """Reads any file of questions that ``visper evaluate`` takes, and opens the source of their images.

    Args:
        path: JSON or JSONL, see ``read_questions``, or Parquet with the same columns; its images may be embedded.
        images: folder of the image paths.

    Raises:
        ConfigError: images are paths and ``images`` is not given, or it is given and not needed.
        DataError: the file or a question is not of the expected form; the message names the question.
    """
    if path.is_dir():
        files = [file.name for file in path.iterdir() if is_json_name(file.name) or file.suffix == ".parquet"]
        files.sort(key=lambda name: ("question" not in name, name))
        hint = f", such as '{path / files[0]}'" if files else ""
        raise ConfigError(f"'{path}' is a folder: name a file of questions (.json, .jsonl or .parquet){hint}")
    if images is not None and not images.is_dir():
        raise ConfigError(f"'{images}' is not a folder: expected the folder of the questions' images")
    if path.suffix != ".parquet":
        questions = read_questions(path)
    else:
        table = read_table([path], NEEDED, OPTIONAL, "questions")
        _refuse_misspelled(_first_row(path), f"'{path}'")
        if "image" not in table.column_names or _is_text(table.features["image"]):
            questions = _questions(path, table)
        else:
            source = TableImages(table, "image")
            if images is not None:
                raise ConfigError(f"'{path}' contains its images: remove --images")
            rows = table.remove_columns("image")
            named = ({**row, "image": list(names)} for row, names in zip(rows, source.names, strict=True))
            return _questions(path, named), source
    if images is None and any(question.images for question in questions):
        raise ConfigError(f"the images of '{path}' are paths: pass their folder with --images")
    if images is not None and not any(question.images for question in questions):
        raise ConfigError(f"no question of '{path}' has an 'image': remove --images, or add the column")
    return questions, ImageFolder(images or Path())


def _first_row(path: Path) -> dict[str, Any]:
    """All columns of a Parquet file's first row, embedded images as a JSON row would have them."""
    with pq.ParquetFile(path) as file:
        embedded = {field.name: {"bytes": ""} for field in file.schema_arrow if holds_images(field.type)}
        others = [name for name in file.schema_arrow.names if name not in embedded]
        first = next(file.iter_batches(1, columns=others), None)
        return {**embedded, **(dict.fromkeys(others) if first is None else first.to_pylist()[0])}


def _is_text(feature: Any) -> bool:
    return getattr(getattr(feature, "feature", feature), "dtype", None) in ("string", "large_string")


def _questions(path: Path, rows: Iterable[Any]) -> list[Question]:
    questions: list[Question] = []
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or "answer" not in row or not isinstance(row.get("question"), str):
            raise DataError(f"{path}: question {number} is {str(row)[:80]!r}: expected question (a text) and answer")
        place = f"'{path}', question {number}"
        _refuse_misspelled(row, place)
        options = _options(row.get("options"), place)
        answers = _accepted(row["answer"], place)
        questions.append(
            Question(
                row["question"],
                _right_option(answers, options, place) if options else answers,
                _images(row.get("image"), place),
                EVERYTHING if row.get("kind") is None else str(row["kind"]),
                options,
                "" if row.get("id") is None else str(row["id"]),
            )
        )
    if not questions:
        raise DataError(f"{path} has no questions")
    if len({question.kind for question in questions}) == 1:
        return questions
    return [replace(question, kind="other") if question.kind == EVERYTHING else question for question in questions]


def _refuse_misspelled(row: Mapping[str, Any], place: str) -> None:
    """Other columns may be there, but one like a missing optional column would silently change the question."""
    for name in OPTIONAL:
        if name in row or name == "id":
            continue
        others = {other: row[other] for other in row if other not in (*NEEDED, *OPTIONAL)}
        alike = [other for other in others if other in ALIKE.get(name, ())] or get_close_matches(name, others, 1, 0.75)
        near = next(iter(alike), unread_image(others) if name == "image" else None)
        if near is not None:
            raise DataError(
                "unread column",
                f"{place} has '{near}', which is not read, and no '{name}': rename the column, or "
                f"add '{name}', null where there is none",
            )


def _accepted(answer: Any, place: str) -> tuple[str, ...]:
    answers = answer if isinstance(answer, list) else [answer]
    if not answers or not all(map(_is_answer, answers)):
        raise DataError("no answer", f"{place}: 'answer' is {str(answer)[:80]!r}: expected a text or a list of texts")
    return tuple(str(one) for one in answers)


def _is_answer(one: Any) -> bool:
    """Whether a value is a text or a number: not a bool, which may mean "True" or "yes", and not NaN."""
    return isinstance(one, (str, int, float)) and not isinstance(one, bool) and one == one and bool(str(one).strip())


def _options(options: Any, place: str) -> tuple[str, ...]:
    if options is None or options == []:
        return ()
    texts = [str(one).strip() for one in options] if isinstance(options, list) else []
    if not 2 <= len(texts) <= len(LETTERS) or not all(texts) or len({plain(text) for text in texts}) < len(texts):
        raise DataError("bad options", f"{place}: 'options' is {str(options)[:80]!r}: expected 2 to 26 different texts")
    return tuple(texts)


def _right_option(answers: tuple[str, ...], options: tuple[str, ...], place: str) -> tuple[str, ...]:
    """The right option's letter and text. Each answer is an option's letter or text; all must mean the same option."""
    letters = LETTERS[: len(options)]
    found = {
        letter
        for answer in answers
        for letter, text in zip(letters, options, strict=True)
        if plain(answer) in (letter.lower(), plain(text))
    }
    if len(found) != 1:
        means = f"means {' and '.join(sorted(found))}" if found else "is not an option"
        raise DataError(
            "bad answer", f"{place}: 'answer' is {', '.join(answers)[:80]!r}, which {means}: expected one option's "
            f"letter ({letters[0]} to {letters[-1]}) or text"
        )  # fmt: skip
    letter = found.pop()
    return letter, options[letters.index(letter)]


def _images(image: Any, place: str) -> tuple[str, ...]:
    images = image if isinstance(image, list) else [image] if image else []
    if not all(isinstance(one, str) and one for one in images):
        raise DataError("bad image", f"{place}: 'image' is {str(image)[:80]!r}: expected a path, or a list of paths")
    return tuple(images)
