"""CV-Bench (Tong et al. 2024): counting and relations in 2D, depth and distance in 3D; multiple choice."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from visper.evaluation.benchmarks.base import Column, Item, Reading, mean, read_parquet, share
from visper.evaluation.choices import LETTERS, read_choice
from visper.evaluation.image_sources import ImageSource

REQUEST = "\nOnly answer the option as the output. For example, if your answer is the option A, answer (A)."
TASKS = ("Count", "Depth", "Relation", "Distance")
FLAT, DEEP = ("ADE20K", "COCO"), ("Omni3D",)


def rows(root: Path) -> tuple[list[Item], ImageSource]:
    """2,638 rows, 2D first."""
    found, images = read_parquet("cv-bench", root, ("idx", "task", "prompt", "choices", "answer", "source"))
    items = [
        Item(
            row["prompt"] + REQUEST,
            (row["answer"].strip("() ").upper(),),
            row["images"],
            row["task"],
            row["source"],
            dict(zip(LETTERS, map(str, row["choices"]), strict=False)),
            str(row["idx"]),
        )
        for row in found
    ]
    return items, images


def read(item: Item, said: str) -> Reading:
    """The published parser takes the first "(B)", else the first character. For an answer with a bracket but no "(B)"
    it reuses the reading of the row before, and it fails on an empty answer: both are None here."""
    if "(" in said:
        match = re.search(r"\(([A-Z])\)", said)
        published = match[1] if match else None
    else:
        published = said[:1] or None
    return Reading(read_choice(said, item.options), published)


def mark(item: Item, text: str | None) -> float:
    """Whether the right option was read."""
    return float(text == item.answers[0])


def columns(items: Sequence[Item], marks: Sequence[float]) -> list[Column]:
    """The four tasks; 2D = mean(ADE20K, COCO), 3D = Omni3D, CV-Bench = mean(2D, 3D). Scores without questions are left
    out."""

    def of(name: str, attribute: str) -> list[Column]:
        own = [number for number, item in enumerate(items) if getattr(item, attribute) == name]
        return [share(name, [items[number] for number in own], [marks[number] for number in own])] if own else []

    found = [column for task in TASKS for column in of(task, "kind")]
    sides = []
    for name, sources in (("2D", FLAT), ("3D", DEEP)):
        parts = [part for source in sources for part in of(source, "source")]
        sides += [mean(name, parts)] if len(parts) == len(sources) else []
    return [*found, *sides, *([mean("CV-Bench", sides)] if len(sides) == 2 else [])]
