"""How answers are read, rule by rule, and where the published parsers read otherwise."""

import pytest

from visper.evaluation.benchmarks import BENCHMARKS
from visper.evaluation.benchmarks.base import Item
from visper.evaluation.benchmarks.mmstar import OPTIONS
from visper.evaluation.benchmarks.ok_vqa import mark
from visper.evaluation.benchmarks.vqa_text import normalize

CV = Item("q", ("B",), (), options={"A": "2", "B": "blue box"})
STAR = Item("q", ("B",), (), options=OPTIONS)
WAY = Item("Which?\nA. Left\nB. Right.\nC. No", ("B",), (), options={"A": "Left", "B": "Right.", "C": "No"})
OPEN = Item("How many?", ("2",), None)


@pytest.mark.parametrize(
    ("name", "item", "said", "read", "published"),
    [
        # CV-Bench: "(X)" anywhere, else the first character.
        ("cv-bench", CV, "(B)", "B", "B"),
        ("cv-bench", CV, "The answer is (B).", "B", "B"),
        ("cv-bench", CV, "The number of chair(s) is (B)", "B", "B"),
        ("cv-bench", CV, "B. blue box", "B", "B"),
        ("cv-bench", CV, "b", "B", "b"),
        ("cv-bench", CV, "(b)", "B", None),  # it takes the answer to the row before
        ("cv-bench", CV, "blue box", "B", "b"),
        ("cv-bench", CV, "The answer is B", "B", "T"),
        ("cv-bench", CV, "2", "A", "2"),
        ("cv-bench", CV, "", None, None),  # it fails
        # MMStar: first character, "(b", "option b", "the answer is b".
        ("mmstar", STAR, "B", "B", "B"),
        ("mmstar", STAR, "b: blue", "B", "B"),
        ("mmstar", STAR, "(B", "B", "B"),
        ("mmstar", STAR, "Option B", "B", "B"),
        ("mmstar", STAR, "The answer is B", "B", "B"),
        ("mmstar", STAR, "The answer is (B)", "B", None),
        ("mmstar", STAR, "Answer: B", "B", "A"),  # the A of "Answer"
        ("mmstar", STAR, "because", None, "B"),
        ("mmstar", STAR, "", None, None),
        # RealWorldQA: number words to digits, an option's text to its letter, exact match without case and punctuation.
        ("realworldqa", WAY, "B", "B", "B"),
        ("realworldqa", WAY, "b.", "B", "B"),
        ("realworldqa", WAY, "B. Right", "B", "B RIGHT"),  # the text of option B ends with a period
        ("realworldqa", WAY, "Left", "A", "A"),
        ("realworldqa", WAY, "left", "A", "LEFT"),
        ("realworldqa", WAY, "Not sure", None, "C"),  # "No" inside a word
        ("realworldqa", OPEN, "Two", "2", "2"),
        ("realworldqa", OPEN, "two.", "2", "TWO"),
        ("realworldqa", OPEN, "2.", "2", "2"),
        ("realworldqa", OPEN, "", "", ""),
        # OK-VQA: VQA's normal form.
        ("ok-vqa", CV, "The Dog.", "dog", "dog"),
    ],
)
def test_an_answer_is_read_and_the_published_parser_known(name, item, said, read, published):
    reading = BENCHMARKS[name].read(item, said)
    assert (reading.text, reading.published) == (read, published)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Dog.", "dog"),
        ("two", "2"),
        ("None", "0"),
        ("ten dogs", "10 dogs"),
        ("dont", "don't"),
        ("don't", "don't"),
        ("Bob's car", "bob 's car"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("st. bernard", "st bernard"),
        ("well-known", "well known"),
        ("red - blue", "red blue"),
        ("a\tcat\nor so?", "cat or so"),
        ("(yes)", "yes"),
        ("", ""),
    ],
)
def test_vqa_normal_form(text, normal):
    assert normalize(text) == normal


def test_vqa_accuracy_leaves_each_annotator_out_in_turn():
    item = Item("what?", ("race",) * 6 + ("motocross",) * 2 + ("ride", "bike"), ("a.jpg",))
    assert mark(item, "race") == 1.0
    # Two of ten said it: for these one other did (1/3), for the other eight two did (2/3).
    assert mark(item, "motocross") == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert mark(item, "ride") == pytest.approx(9 / 3 / 10)
    assert mark(item, "swim") == mark(item, None) == 0.0
