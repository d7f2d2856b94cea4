"""The normal form in which VQA compares answers (Antol et al. 2015, as the EvalAI server computes it)."""

from __future__ import annotations

import re

NUMBERS = {word: str(value) for value, word in enumerate(
    ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
)}  # fmt: skip
ARTICLES = ("a", "an", "the")
_CONTRACTIONS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's I'd've I'm I've isn't it'd it'd've it'll let's ma'am mightn't mightn't've "
    "might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't shouldn't've somebody'd "
    "somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've "
    "something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't "
    "we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll "
    "who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've "
    "you'll you're you've"
)
CONTRACTIONS = {word.replace("'", "").lower(): word for word in _CONTRACTIONS.split()}
_SIGNS = ';/[]"{}()=+\\_-><@`,?!'


def normalize(text: str) -> str:
    """Lower case, without articles and most punctuation; number words as digits; contractions with apostrophes."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    original = text
    for sign in _SIGNS:
        # A sign beside a space is removed; one between letters becomes a space.
        text = text.replace(sign, "" if f"{sign} " in original or f" {sign}" in original else " ")
    words = re.sub(r"\.(?!\d)", "", text).split()
    words = [{**NUMBERS, "none": "0"}.get(word, word) for word in words]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)
