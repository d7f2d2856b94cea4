"""Questions are true, balanced, and unanswerable from a cheap cue."""

from collections import Counter

import pytest

from tools.quickstart_bases.vocabulary import new_tokenizer
from visper.quickstart.language import caption, look_up, place_words
from visper.quickstart.questions import (
    CHANCE,
    DEPTH_RATIO,
    DISTANCE_RATIO,
    KINDS,
    Question,
    apart,
    cheap_cues,
    draw_questions,
)
from visper.quickstart.scenes import SceneObject, draw_scene

Scenes = list[tuple[SceneObject, ...]]


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return [draw_scene(21, index).objects for index in range(150)]


@pytest.fixture(scope="module")
def questions(scenes: Scenes) -> list[Question]:
    return draw_questions(scenes, 0)


def test_all_four_kinds_are_asked(questions: list[Question]) -> None:
    assert {q.kind for q in questions} == set(KINDS)


def test_answers_are_true_to_the_geometry(scenes: Scenes, questions: list[Question]) -> None:
    for question in questions:
        things = [scenes[question.scene][i] for i in question.objects]
        if question.kind == "count":
            assert int(question.answer) == sum(o.shape == question.detail for o in scenes[question.scene])
            continue
        first = question.answer in ("A", "left", "above")
        one, two = (things[0], things[1]) if first else (things[1], things[0])
        if question.kind == "relation":
            assert one.column < two.column if question.detail == "x" else one.row < two.row
        elif question.kind == "depth":
            assert DEPTH_RATIO * one.depth <= two.depth
        else:
            assert DISTANCE_RATIO * apart(one, things[2]) <= apart(two, things[2])


def test_answers_are_balanced(questions: list[Question]) -> None:
    for kind, detail in {(q.kind, q.detail if q.kind == "relation" else "") for q in questions}:
        mine = [q.answer for q in questions if q.kind == kind and detail in ("", q.detail)]
        for number in Counter(mine).values():
            assert number / len(mine) == pytest.approx(CHANCE[kind], abs=0.06)


def test_no_cheap_cue_answers_the_questions(scenes: Scenes, questions: list[Question]) -> None:
    for kind, cues in cheap_cues(scenes, questions).items():
        for cue, accuracy in cues.items():
            # 150 scenes leave 150 to 2000 questions a kind, so an unbalanced but idle cue may stray by 0.1.
            assert accuracy < CHANCE[kind] + 0.12, f"{kind}: {cue}"


def test_questions_are_deterministic(scenes: Scenes, questions: list[Question]) -> None:
    assert draw_questions(scenes, 0) == questions


def test_the_tokenizer_knows_every_word(scenes: Scenes, questions: list[Question]) -> None:
    tokenizer = new_tokenizer()
    texts = [q.text(scenes[q.scene]) + " " + q.answer for q in questions[:400]]
    for objects in scenes[:20]:
        texts += [caption(objects), *look_up(objects), *look_up(objects[:1])]
    for ids in tokenizer(texts).input_ids:
        assert tokenizer.unk_token_id not in ids


def test_an_objects_name_is_one_token(scenes: Scenes) -> None:
    tokenizer = new_tokenizer()
    thing = scenes[0][0]
    assert len(tokenizer(thing.name).input_ids) == 1
    assert len(tokenizer(place_words(thing)).input_ids) == 3


def test_the_chat_template_closes_every_turn() -> None:
    tokenizer = new_tokenizer()
    messages = [
        {"role": "system", "content": "a"},
        {"role": "user", "content": "red ?"},
        {"role": "assistant", "content": "left"},
    ]
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert tokenizer.decode(ids) == "<s> <|system|> a <|end|> <|user|> red ? <|end|> <|assistant|> left <|end|>"
