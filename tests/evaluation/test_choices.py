"""What an answer to a multiple-choice question means."""

import pytest

from visper.evaluation.choices import ask_with_options, plain, read_choice

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
        ("The number of chair(s) is (B)", "B"),  # no option S
        ("Answer: x, so the answer is B", "B"),
        ("The chair(s) and box(es)", "A"),
        ("'B'", "B"),  # MMStar's prompt asks for "answer letter 'A' only"
        ("**B**", "B"),
        ("`b`", "B"),
        ("**B**: sphere", "B"),
        ("**B** is right", "B"),
        ("'B' because", "B"),
        ("The answer is **B**.", "B"),
        ("The answer is: B", "B"),
        ("The answer is 'B' because", "B"),
        ("The answer is: **B. sphere**", "B"),
        ("Answer: **B**", "B"),
        ("**The correct choice is:** B)", "B"),
        ("The answer is a 'box'", "A"),
        ("The answer is **A** because of its color", "A"),  # marked, as "B" would be read
        ("The answer is 'A' because", "A"),
        ("The answer is A because of its color", "A"),
        ("**A** is right", "A"),
        ("**The answer is A** and not the box", "A"),
        ("**Option A** is the only one", "A"),
        ("A's sphere", "B"),
        ("A because of its color", "A"),
        ("The answer is A sphere", "B"),
        ("*A sphere* is there", "B"),
        ("The answer is: I'm not sure", None),
    ],
)
def test_an_answer_means_one_option_or_none(said, letter):
    assert read_choice(said, OPTIONS) == letter


@pytest.mark.parametrize(
    ("text", "form"),
    [
        (" (A). ", "a"),
        ("“Cat”…", "cat"),
        ("猫。", "猫"),
        ("نعم؟", "نعم"),
        ("cafe\u0301", "café"),
        ("The  Box!", "the box"),
        ("?", "?"),
        ("-5", "-5"),
        ("(-5)", "-5"),
        ("\N{MINUS SIGN}5.", "-5"),
        ("-5 degrees", "-5 degrees"),
        ("- 5", "5"),  # a dash
        ("-$5", "-5"),
        ("-€5", "-€5"),
        ("+3", "3"),
        ("-0.0", "0"),
        (".5", "0.5"),
        ("-.50", "-0.5"),
        ("0.50", "0.5"),
        ("...5", "5"),  # an ellipsis
        ("5.", "5"),
        ("5%", "5"),
        ("007", "7"),
        ("12345678901234567890123456789012345.0", "12345678901234567890123456789012345"),
        ("1-5", "1-5"),
        ("1.2.3", "1.2.3"),
        ("-yes-", "yes"),
        ("C++", "c++"),
        ("(C#)", "c#"),
        ("C", "c"),
        ("-5 C.", "-5 c"),
    ],
)
def test_the_plain_form_keeps_what_makes_another_number_or_name(text, form):
    assert plain(text) == form


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("-5", "B"),
        ("5", "A"),
        ("it is -5", "B"),
        ("it is 5", "A"),
        ("it is .50", "C"),
        ("it is 5.3", None),
        ("from 5-10", "A"),
        ("covid-19", None),
        ("it is -3 m", "E"),
        ("it is 3 m", "D"),
        ("it is 3.3 m", None),
    ],
)
def test_options_that_are_numbers_are_read_with_their_sign_and_point(said, letter):
    assert read_choice(said, {"A": "5", "B": "-5", "C": "0.5", "D": "3 m", "E": "-3 m"}) == letter


def test_letters_alone_are_read_where_texts_are_unknown():
    unknown = dict.fromkeys("ABCD", "")
    assert [read_choice(said, unknown) for said in ("c", "(D)", "yes", "A")] == ["C", "D", None, "A"]


def test_an_option_that_is_another_ones_letter_is_not_mistaken():
    assert read_choice("A", {"A": "B", "B": "A"}) == "A"
