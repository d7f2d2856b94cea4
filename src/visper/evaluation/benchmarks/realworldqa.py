"""RealWorldQA (xAI 2024): 765 photographs, many from cars; multiple choice, numbers and words."""

from __future__ import annotations

import re
import string
from pathlib import Path

from visper.evaluation.benchmarks.base import Item, Reading, read_parquet
from visper.evaluation.benchmarks.vqa_text import NUMBERS
from visper.evaluation.choices import LETTERS, plain, read_choice
from visper.evaluation.image_sources import ImageSource

_OPTION = re.compile(r"\b([A-Z])\.\s+([^\n]*)")
_SIGNS = str.maketrans("", "", string.punctuation)


def rows(root: Path) -> tuple[list[Item], ImageSource]:
    """765 rows; the question is the complete prompt and names the options and how to answer."""
    found, images = read_parquet("realworldqa", root, ("question", "answer"))
    items = []
    for row in found:
        question, answer = row["question"].strip(), row["answer"].strip()
        options = {letter: text.strip() for letter, text in _OPTION.findall(question)}
        items.append(Item(question, (answer,), row["images"], options=options if answer in options else {}))
    return items, images


def read(item: Item, said: str) -> Reading:
    """Options by letter or text; otherwise number words become digits, and case and punctuation do not count.

    The published parser searches the answer, without punctuation, for an option's text, case-sensitively and even
    inside a word; if it finds none, it takes the answer itself.
    """
    ours, said = (NUMBERS.get(form, said) for form in (plain(said), said.strip().lower()))
    cleaned = re.sub(r"[^\w\s]", "", said).strip()
    # It numbers the options it finds, whatever letters they have; of equal texts the last counts.
    texts = dict(zip((text.strip() for _, text in _OPTION.findall(item.prompt)), LETTERS, strict=False))
    found = re.search("|".join(map(re.escape, texts)), cleaned)
    published = bare(texts.get(found[0], cleaned) if found else cleaned)
    return Reading(read_choice(ours, item.options) if item.options else bare(ours), published)


def bare(text: str) -> str:
    """Upper case, without punctuation: the form that is compared, which an option's letter already has."""
    return text.translate(_SIGNS).strip().upper()


def mark(item: Item, text: str | None) -> float:
    """Whether the reading is the right answer."""
    return float(text == bare(item.answers[0]))
