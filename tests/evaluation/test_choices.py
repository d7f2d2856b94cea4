"""What an answer to a multiple-choice question means."""

import pytest

from visper.evaluation.choices import ask_with_options, read_choice

OPTIONS = {"A": "box", "B": "sphere", "C": "red sphere"}


def test_options_are_asked_with_a_letter_each():
    assert ask_with_options("Which?", ["box", "sphere"]) == (
        "Which?\n(A) box\n(B) sphere\nAnswer with the option's letter from the given choices directly."
    )


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("B.", "B"),
        ("(B) sphere", "B"),
        ("( b )", "B"),
        ("b) sphere", "B"),
        ("B: sphere", "B"),
        ("Option B", "B"),
        ("option b.", "B"),
        ("The answer is (B)", "B"),
        ("The answer is B.", "B"),
        ("Answer: B", "B"),
        ("the answer is b", "B"),
        ("B sphere", "B"),
        ("Sphere.", "B"),
        ("red sphere", "C"),
        ("A box", "A"),  # the one option named, not the article
        ("A sphere", "B"),
        ("A cylinder", None),
        ("It is the box", "A"),
        ("box or sphere", None),
        ("D", None),
        ("because", None),
        ("", None),
        (" ", None),
        ("The answer is a sphere", "B"),
        ("I don't know", None),
    ],
)
def test_an_answer_means_one_option_or_none(said, letter):
    assert read_choice(said, OPTIONS) == letter


def test_letters_alone_are_read_where_texts_are_unknown():
    unknown = dict.fromkeys("ABCD", "")
    assert [read_choice(said, unknown) for said in ("c", "(D)", "yes", "A")] == ["C", "D", None, "A"]


def test_an_option_that_is_another_ones_letter_is_not_mistaken():
    assert read_choice("A", {"A": "B", "B": "A"}) == "A"
