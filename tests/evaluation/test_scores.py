"""A score stands beside what needs no image, and a model that scores by the words alone does not look good."""

import re

from visper.common.console import Console
from visper.evaluation.questions import Question, judge
from visper.evaluation.scores import blind_scores, scores, show_scores

KINDS = {"yes/no": ("yes", "yes", "yes", "no"), "count": ("1", "2", "2", "3")}
QUESTIONS = [Question("?", (answer,), (f"{answer}.png",), kind) for kind, own in KINDS.items() for answer in own]


def answered(said, image="x.png"):
    return [judge(question, (image,), one) for question, one in zip(QUESTIONS, said, strict=True)]


def test_the_best_constant_answer_by_kind_and_over_all():
    rows = scores(answered(["yes"] * 8))
    assert [(row.kind, row.correct, row.total, row.constant, row.constant_answer) for row in rows] == [
        ("yes/no", 3, 4, 3, "yes"),
        ("count", 0, 4, 2, "2"),
        ("all", 3, 8, 5, ""),
    ]


def test_the_best_constant_answer_is_any_accepted_one():
    questions = [Question("?", ("red", "crimson")), Question("?", ("blue", "navy")), Question("?", ("Crimson.",))]
    (row,) = scores([judge(question, (), "") for question in questions])
    assert (row.constant, row.constant_answer) == (2, "crimson")


def shown(capsys, said, control):
    show_scores(Console(width=160), scores(answered(said)), blind_scores(control))
    return capsys.readouterr().out


def test_a_model_that_answers_by_the_words_alone_is_called_so(capsys):
    said = ["yes"] * 4 + ["2"] * 4
    text = shown(capsys, said, answered(said, "other.png"))
    assert re.search(r"yes/no +│ 75.0% +│ .* │ 75.0% \(yes\) +│ 75.0% +│ 3 / 4", text)
    assert "not above a control that needs no image (within the interval): yes/no, count, all" in text


def test_a_model_that_looks_is_not_doubted(capsys):
    said = [question.answers[0] for question in QUESTIONS]
    many = [row for number in range(20) for row in answered(said, f"{number}.png")]
    show_scores(Console(width=160), scores(many), blind_scores(answered(["yes"] * 4 + ["2"] * 4, "other.png")))
    assert "needs no image" not in capsys.readouterr().out


def test_a_model_that_is_right_on_a_few_images_is_doubted_however_many_questions_they_have(capsys):
    """All questions about three images are right, those about a fourth are wrong. Over questions: 58 to 87 %."""
    questions = [Question("?", ("yes" if n % 8 < 4 else "no",), (f"{n // 8}.png",)) for n in range(32)]
    own = [judge(q, q.images, "?" if q.images == ("0.png",) else q.answers[0]) for q in questions]
    (row,) = scores(own)
    assert (row.correct, row.constant) == (24, 16) and row.interval[0] < 0.2 and row.interval[1] > 0.95
    show_scores(Console(width=160), [row])
    assert "not above a control that needs no image" in capsys.readouterr().out


def test_kinds_without_images_have_no_blind_control(capsys):
    control = [judge(question, () if question.kind == "count" else ("x.png",), "") for question in QUESTIONS]
    assert set(blind_scores(control)) == {"yes/no", "all"}
    assert re.search(r"count .*│ no image +│", shown(capsys, [""] * 8, control))


def test_without_a_control_there_is_no_column_for_it(capsys):
    assert "blind" not in shown(capsys, [""] * 8, None)
