"""Multiple choice: prompts with options, and reading the option that an answer means."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Mapping, Sequence

LETTERS = string.ascii_uppercase
ASK_FOR_LETTER = "Answer with the option's letter from the given choices directly."
_IN_BRACKETS = re.compile(r"\(\s*([A-Za-z])\s*\)")
_NO_ARTICLE = r"(?=[*`'\"’”]+(?!\w)|\s+(?:because|since|as|is)\b)"  # behind an A that is marked, or without a noun
_MARKS = r"[\s*`'\"’”]*"  # behind a letter in bold, code or quotes: **B**, `B`, 'B'
_FIRST = re.compile(rf"\A\W*(?:option\s+)?([A-Za-z]){_MARKS}(?:[).:,\]]|$)", re.IGNORECASE)
_NAMED = re.compile(
    r"\b(?i:answer|option|choice)(?:\s+(?i:is))?[\s:=*`'\"‘“(\[-]*"
    rf"(?:([A-Za-z])(?={_MARKS}(?:[).:,;\]]|$))|([B-Z])\b(?!['’]\w)|(A){_NO_ARTICLE})"
)
_LETTER_THEN_TEXT = re.compile(rf"\A\W*([B-Z])[*`'\"’”]*\s|\A\W*(A)(?:\s+(?=[A-Z\d])|{_NO_ARTICLE})")
_ENDS = string.punctuation + " ‘’“”«»…。，、！？；：（）「」『』؟،؛¿¡"
_NUMBER = re.compile(r"([-+]?)(?=\.?[0-9])([0-9]*)(?:\.([0-9]+))?")
_NUMBERS_INSIDE = re.compile(rf"(?<![\w.]){_NUMBER.pattern}(?!\w|\.[0-9])")


def ask_with_options(question: str, options: Sequence[str]) -> str:
    """The question, its options with letters, and the request to answer with a letter."""
    lines = [f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([question, *lines, ASK_FOR_LETTER])


def read_choice(said: str, options: Mapping[str, str]) -> str | None:
    """The letter of the option that an answer means; None if it names none or several.

    These forms are tried in order: only the text of an option; "(B)" anywhere; a letter at the start, followed by
    punctuation or nothing ("b", "B.", "Option B:"); "the answer is B"; a capital letter followed by text ("B the box",
    but not "A box", whose A is an article; in "**A** box" and "A because" it is the letter); the text of exactly one
    option anywhere in the answer. Of several matches of a form, the first whose letter is an option's counts:
    "chair(s) (B)" means B.

    Args:
        options: letter -> text, empty if it is not known.
    """
    texts = {letter: plain(text) for letter, text in options.items() if plain(text)}
    whole = plain(said)
    named = [letter for letter, text in texts.items() if text == whole]
    if named and whole.upper() not in options:
        return named[0] if len(named) == 1 else None
    for pattern in (_IN_BRACKETS, _FIRST, _NAMED, _LETTER_THEN_TEXT):
        for match in pattern.finditer(said):
            letter = next(filter(None, match.groups()), "").upper()
            if letter in options:
                return letter
    held = [letter for letter, text in texts.items() if _holds(whole, text)]
    return held[0] if len(held) == 1 else None


def _holds(whole: str, text: str) -> bool:
    """Whether a plain answer has a plain text in it, as words or as a number: "it is 5.30 m" has 5.3, but not 5."""
    if _NUMBER.fullmatch(text):
        return any(_value(found) == text for found in _NUMBERS_INSIDE.finditer(whole))
    unsigned = r"(?<!^[-+.])(?<!\s[-+.])" if text[0].isdigit() else ""  # "5 m" is not in "it is -5 m"
    return re.search(rf"(?<!\w)(?<![0-9]\.){unsigned}{re.escape(text)}(?!\w|\.[0-9])", whole) is not None


def plain(text: str) -> str:
    """The form in which answers are compared: ``(A).`` becomes ``a``, ``.50 `` becomes ``0.5``.

    Lower case, single spaces, no punctuation at the ends unless there is nothing else. A sign or point before a number
    is kept, and so are plus signs and hashes behind a letter (``C++``). A number alone is written in one form.
    """
    text = unicodedata.normalize("NFC", text)  # an accent may be a character of its own
    spaced = re.sub(r"\s+", " ", text.lower().replace("\N{MINUS SIGN}", "-")).strip()
    words = spaced.strip(_ENDS)
    if not words:
        return spaced
    before, _, behind = spaced.partition(words)
    if words[-1].isalpha() and (signs := re.match(r"[+#]+", behind)):
        words += signs[0]
    if re.match(r"[€£¥]?[0-9]", words) and (lead := re.search(r"([-+]?)\$?((?<!\.)\.)?$", before)):
        words = lead[1] + (lead[2] or "") + words
    number = _NUMBER.fullmatch(words)
    return _value(number) if number else words


def _value(number: re.Match[str]) -> str:
    """A match of ``_NUMBER`` without plus sign and without zeros at the ends; digits are never rounded."""
    sign, whole, fraction = number[1], number[2].lstrip("0") or "0", (number[3] or "").rstrip("0")
    value = f"{whole}.{fraction}" if fraction else whole
    return f"-{value}" if sign == "-" and value != "0" else value
