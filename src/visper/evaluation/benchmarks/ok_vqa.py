"""OK-VQA (Marino et al. 2019): 5,046 questions on COCO val2014 that need outside knowledge; ten answers each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visper.common.errors import DataError
from visper.evaluation.benchmarks.base import Item, Reading, require_prepared
from visper.evaluation.benchmarks.vqa_text import normalize
from visper.evaluation.image_sources import ImageFolder, ImageSource

REQUEST = (
    "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
    "\nAnswer the question using a single word or phrase."
)
QUESTIONS, ANNOTATIONS = "OpenEnded_mscoco_val2014_questions.json", "mscoco_val2014_annotations.json"


def rows(root: Path) -> tuple[list[Item], ImageSource]:
    """5,046 rows, with the answers of ten annotators each."""
    require_prepared("ok-vqa", root)
    folder = root / "eval" / "ok-vqa"
    answers = {
        entry["question_id"]: tuple(str(answer["answer"]) for answer in entry["answers"])
        for entry in _entries(folder / ANNOTATIONS, "annotations", ("question_id", "answers"))
    }
    items = []
    for row in _entries(folder / QUESTIONS, "questions", ("question_id", "image_id", "question")):
        if row["question_id"] not in answers:
            raise DataError("no answers", f"'{folder / ANNOTATIONS}' has no answers to question {row['question_id']}")
        image = f"COCO_val2014_{row['image_id']:012d}.jpg"
        items.append(Item(row["question"] + REQUEST, answers[row["question_id"]], (image,), id=str(row["question_id"])))
    return items, ImageFolder(root / "coco" / "val2014")


def _entries(file: Path, key: str, fields: Sequence[str]) -> list[dict[str, Any]]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        remedy = f"remove it, then `visper data prepare ok-vqa --root {file.parents[2]}` downloads it again"
        raise DataError("not JSON", f"'{file}': {error}; {remedy}") from error
    entries: Any = content.get(key) if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise DataError("missing column", f"'{file}' has no list '{key}'")
    for field in fields:
        if any(not isinstance(entry, dict) or field not in entry for entry in entries):
            raise DataError("missing column", f"'{file}': an entry of '{key}' has no '{field}'")
    return entries


def read(item: Item, said: str) -> Reading:
    """VQA's normal form, the same as the published parser's."""
    text = normalize(said)
    return Reading(text, text)


def mark(item: Item, text: str | None) -> float:
    """VQA accuracy: the mean, over the annotators, of min(1, matches among the other nine / 3)."""
    normal = [normalize(answer) for answer in item.answers]
    matches = sum(answer == text for answer in normal)
    return sum(min(1.0, (matches - (answer == text)) / 3) for answer in normal) / len(normal)
