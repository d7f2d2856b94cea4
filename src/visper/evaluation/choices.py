"""Multiple choice: prompts with options, and reading the option that an answer means."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence

LETTERS = string.ascii_uppercase
ASK_FOR_LETTER = "Answer with the option's letter from the given choices directly."
_IN_BRACKETS = re.compile(r"\(\s*([A-Za-z])\s*\)")
_FIRST = re.compile(r"\W*(?:option\s+)?([A-Za-z])\s*(?:[).:,\]]|$)", re.IGNORECASE)
_NAMED = re.compile(
    r"\b(?i:answer|option|choice)(?:\s+(?i:is)|\s*:)?\s*\W?(?:([A-Za-z])(?=\s*(?:[).:,;\]]|$))|([B-Z])\b(?!['’]))"
)
_LETTER_THEN_TEXT = re.compile(r"\W*([B-Z])\s|\W*(A)\s+(?=[A-Z\d])")


def ask_with_options(question: str, options: Sequence[str]) -> str:
    """The question, its options with letters, and the request to answer with a letter."""
    lines = [f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([question, *lines, ASK_FOR_LETTER])


def read_choice(said: str, options: Mapping[str, str]) -> str | None:
    """The letter of the option that an answer means; None if it names none or several.

    These forms are tried in order: only the text of an option; "(B)" anywhere; a letter at the start, followed by
    punctuation or nothing ("b", "B.", "Option B:"); "the answer is B"; a capital letter followed by text ("B the box",
    but not "A box", whose A is an article); the text of exactly one option anywhere in the answer.

    Args:
        said: the answer.
        options: letter -> text, empty if it is not known.
    """
    texts = {letter: plain(text) for letter, text in options.items() if plain(text)}
    whole = plain(said)
    named = [letter for letter, text in texts.items() if text == whole]
    if named and whole.upper() not in options:
        return named[0] if len(named) == 1 else None
    for pattern in (_IN_BRACKETS, _FIRST, _NAMED, _LETTER_THEN_TEXT):
        match = pattern.search(said) if pattern in (_IN_BRACKETS, _NAMED) else pattern.match(said)
        letter = next(filter(None, match.groups()), "").upper() if match else ""
        if letter in options:
            return letter
    held = [letter for letter, text in texts.items() if re.search(rf"\b{re.escape(text)}\b", whole)]
    return held[0] if len(held) == 1 else None


def plain(text: str) -> str:
    """Lower case, single spaces, no punctuation at the ends unless there is nothing else: ``(A).`` becomes ``a``."""
    spaced = re.sub(r"\s+", " ", text.lower()).strip()
    return spaced.strip(string.punctuation + " ") or spaced
