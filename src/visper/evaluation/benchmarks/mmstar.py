"""MMStar (Chen et al. 2024): 1,500 questions that cannot be answered without the image; multiple choice."""

from __future__ import annotations

import re
from pathlib import Path

from visper.evaluation.benchmarks.base import Item, Reading, read_parquet
from visper.evaluation.choices import read_choice
from visper.evaluation.image_sources import ImageSource

REQUEST = "\nAnswer with the option's letter from the given choices directly, such as answer letter 'A' only. \n"
OPTIONS = dict.fromkeys("ABCD", "")
"""The texts are in the question, separated by commas, which may also occur in a text."""
_PUBLISHED = re.compile(r"(?:\(|option |the answer is )?([a-d])")


def rows(root: Path) -> tuple[list[Item], ImageSource]:
    """1,500 rows, 250 of each category."""
    found, images = read_parquet("mmstar", root, ("index", "question", "answer", "category"))
    items = [
        Item(
            row["question"] + REQUEST,
            (row["answer"].strip().upper(),),
            row["images"],
            row["category"],
            options=OPTIONS,
            id=str(row["index"]),
        )
        for row in found
    ]
    return items, images


def read(item: Item, said: str) -> Reading:
    """The published parser takes the character at the start, or after "(", "option " or "the answer is "."""
    match = _PUBLISHED.match(said.lower().strip())
    return Reading(read_choice(said, item.options), match[1].upper() if match else None)


def mark(item: Item, text: str | None) -> float:
    """Whether the right option was read. (The published code divides by 1,500, however many were asked.)"""
    return float(text == item.answers[0])
