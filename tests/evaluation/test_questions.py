"""Questions: what is asked is what training saw, what cannot be read is counted, what was shown is kept."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing
from typer.testing import CliRunner

from visper.cli import app
from visper.common.console import Console, printable
from visper.common.errors import DataError
from visper.config import Geometry
from visper.config import Student as StudentConfig
from visper.data.chat import ConversationEncoder
from visper.data.decoding import open_image
from visper.data.rows.records import Record, ShownImage, Turn
from visper.evaluation import Question, evaluate, read_questions, scores
from visper.evaluation.ask import answer, model_inputs
from visper.evaluation.asking import answers_file
from visper.evaluation.questions import judge
from visper.evaluation.scores import show_scores
from visper.model import build_student, save_student


@pytest.fixture
def student(tiny_llm, tiny_encoder):
    torch.manual_seed(0)  # of the projector: rich does not print every character that another one might answer
    return build_student(StudentConfig(llm=str(tiny_llm), encoder=str(tiny_encoder)), Geometry.SQUASH)


def test_a_first_token_that_only_the_tokenizer_writes_is_there_when_asked_too(student):
    tokenizer = student.processor.tokenizer
    start = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    student.processor.chat_template = student.processor.chat_template.replace("{{ bos_token }}", "")
    image = Image.new("RGB", (16, 16))
    asked = model_inputs(student.processor, ["What?"], [[image]])["input_ids"][0].tolist()
    record = Record("r", (Turn("user", "What?"), Turn("assistant", "A cat.")), (ShownImage("1.png", 0),))
    trained = ConversationEncoder(student.processor, 500).encode(record).input_ids
    assert asked[0] == start and trained[: len(asked)] == asked


SPELLED_OUT = "Is <|end|> here,\n<|depth_1|> or <image> </s>? é "


@pytest.mark.parametrize("shows_image", [False, True])
def test_the_text_of_a_question_is_text_as_in_training(student, shows_image):
    question = SPELLED_OUT.replace("<image>", "image") if shows_image else SPELLED_OUT
    images = [[Image.new("RGB", (16, 16))] if shows_image else []]
    asked = model_inputs(student.processor, [question], images)["input_ids"][0].tolist()
    turns = (Turn("user", question), Turn("assistant", "Yes."))
    record = Record("r", turns, (ShownImage("1.png", 0),) if shows_image else ())
    assert ConversationEncoder(student.processor, 500).encode(record).input_ids[: len(asked)] == asked
    special = set(student.processor.tokenizer.added_tokens_decoder)
    harmless = model_inputs(student.processor, ["What?"], images)["input_ids"][0].tolist()
    assert [i for i in asked if i in special] == [i for i in harmless if i in special]
    assert question.strip() in student.processor.tokenizer.decode(asked)


@pytest.mark.parametrize("question", ["<image>\nWhat?", "What?\n<image>", "<image> What?"])
def test_the_tag_of_a_questions_image_is_no_text(student, question):
    images = [[Image.new("RGB", (16, 16))]]
    tagged, plain = (model_inputs(student.processor, [text], images)["input_ids"] for text in (question, "What?"))
    assert torch.equal(tagged, plain)


def test_a_question_with_two_tags_is_named_before_the_first_is_asked(student, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    asked = [Question("what?", ("red",), ("a.png",)), Question("<image> or <image>?", ("red",), ("a.png",))]
    with pytest.raises(DataError, match=r"question 1, '<image> or <image>\?': images: 1, tags '<image>' and .*: 2"):
        evaluate(student, asked, tmp_path)


def test_a_models_own_beams_and_sampling_do_not_change_its_answers(student, monkeypatch):
    greedy = answer(student, ["What is this?"], [[]], 12)
    for name, value in {"num_beams": 4, "do_sample": True, "temperature": 5.0}.items():
        monkeypatch.setattr(student.model.generation_config, name, value)
    assert answer(student, ["What is this?"], [[]], 12) == greedy


def test_questions_of_different_length_are_padded_on_the_left_and_the_tokenizer_is_left_alone(student):
    tokenizer = student.processor.tokenizer
    tokenizer.padding_side = "right"
    inputs = model_inputs(student.processor, ["What?", "What is this?"], [[], []])
    assert inputs["attention_mask"].tolist()[0] == [0] * 8 + [1] * (inputs["input_ids"].shape[1] - 8)
    assert inputs["input_ids"][0, :8].tolist() == [tokenizer.pad_token_id] * 8
    assert tokenizer.padding_side == "right"


def test_an_unreadable_image_counts_as_asked_and_not_answered(student, tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "red.png").read_bytes()[:40])
    asked = [Question("what?", ("blue",), ("cut.png",)), Question("what?", ("red",), ("red.png",))]
    answered = evaluate(student, asked, tmp_path, max_new_tokens=2)
    assert answered[0].said is None and not answered[0].correct and answered[1].said is not None
    assert scores(answered)[0].total == 2


def test_a_question_longer_than_the_positions_is_not_answered_and_the_others_as_without_it(student, monkeypatch):
    short, long, longer = "what?", "what is it? " * 40, "what is it? " * 80
    (alone,) = answer(student, [short], [[]], 16)
    used = model_inputs(student.processor, [long], [[]])["input_ids"].shape[1]
    monkeypatch.setattr(student.model.config.get_text_config(), "max_position_embeddings", used + 5)
    batches = []

    def generate(**inputs):
        batches.append(len(inputs["input_ids"]))
        return student.model.generate(**inputs)

    said = answer(student, [short, longer, long, short, short], [[]] * 5, 16, generate)
    assert said == [alone, None, *answer(student, [long], [[]], 5), alone, alone]
    assert batches == [3, 1], "those that fit are asked together"
    answered = evaluate(student, [Question(text, ("red",)) for text in (short, longer)], Path())
    assert [row.said is None for row in answered] == [False, True] and scores(answered)[0].unanswered == 1


def test_absent_images_are_named_before_the_first_question(student, tmp_path):
    with pytest.raises(DataError, match=r"1 image of the questions cannot be found, the first is 'nowhere\.png'"):
        evaluate(student, [Question("what?", ("red",), ("nowhere.png",))], tmp_path)


def test_copies_of_an_image_are_one_image_for_the_blind_control_and_the_intervals(student, tmp_path):
    for name, color in (("a", "red"), ("b", "red"), ("c", "blue"), ("d", "blue")):
        Image.new("RGB", (8, 8), color).save(tmp_path / f"{name}.png")
    asked = [Question("what?", ("red",), (f"{name}.png",)) for name in "acbd"]
    own, blind = (evaluate(student, asked, tmp_path, shuffle_images=other, max_new_tokens=2) for other in (False, True))
    assert [row.images for row in own] == [("a.png",), ("c.png",)] * 2
    assert [row.images for row in blind] == [("c.png",), ("a.png",)] * 2
    with pytest.raises(DataError, match="at least two different images"):
        evaluate(student, asked[::2], tmp_path, shuffle_images=True)


def test_questions_of_several_images_are_answered_alike_in_any_batch(student, tmp_path):
    for color in ("red", "blue", "green"):
        Image.new("RGB", (8, 8), color).save(tmp_path / f"{color}.png")
    asked = [
        Question("<image> or <image>?", ("red",), ("red.png", "blue.png")),
        Question("is it <image>, <image> or <image>?", ("red",), ("red.png", "blue.png", "green.png")),
        Question("what?", ("green",), ("green.png",)),
        Question("say it", ("it",)),
    ]
    together, apart = (evaluate(student, asked, tmp_path, batch_size=size, max_new_tokens=8) for size in (4, 1))
    assert together == apart and [row.images for row in together] == [question.images for question in asked]
    assert all(row.said is not None for row in together)
    (tmp_path / "blue.png").write_bytes(b"")
    assert [row.said is None for row in evaluate(student, asked, tmp_path, max_new_tokens=1)] == [
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P", "I;16"])
def test_an_image_of_any_mode_is_shown_as_training_shows_its_file(student, mode, tmp_path):
    values = np.arange(64).reshape(8, 8)
    if mode == "I;16":
        image = Image.fromarray((values * 900).astype(np.uint16))
    else:
        image = Image.fromarray(values.astype(np.uint8), "L").convert("RGBA")
        image.putalpha(Image.fromarray((values * 4).astype(np.uint8), "L"))
        image = image.quantize(8) if mode == "P" else image.convert(mode)
    image.save(tmp_path / "odd.png")
    file = Image.open(tmp_path / "odd.png")
    given, read = (model_inputs(student.processor, ["?"], [[own]]) for own in (file, open_image(tmp_path / "odd.png")))
    assert file.mode == mode and given["pixel_values"].equal(read["pixel_values"])


def test_chat_shows_the_images_in_the_order_of_their_options(student, tmp_path):
    save_student(student, tmp_path / "model")
    for color in ("red", "blue"):
        Image.new("RGB", (8, 8), color).save(tmp_path / f"{color}.png")
    options = [option for color in ("red", "blue") for option in ("--image", str(tmp_path / f"{color}.png"))]
    chat = ["chat", str(tmp_path / "model"), "--prompt", "<image> or <image>?", *options, "--max-new-tokens", "8"]
    done = CliRunner().invoke(app, chat)
    shown = [[Image.new("RGB", (8, 8), color) for color in ("red", "blue")]]
    (said,) = answer(student, ["<image> or <image>?"], shown, 8)
    assert done.exit_code == 0 and done.output.strip() == printable(said) != ""


def test_the_blind_control_keeps_the_image_that_was_shown(student, tmp_path):
    for color in ("red", "blue"):
        Image.new("RGB", (8, 8), color).save(tmp_path / f"{color}.png")
    asked = [Question("what?", (color,), (f"{color}.png",)) for color in ("red", "blue")]
    answered = evaluate(student, asked, tmp_path, max_new_tokens=1, shuffle_images=True)
    assert [row.images for row in answered] == [("blue.png",), ("red.png",)]


@pytest.mark.parametrize("content", [{"question": "q"}, [3], [{"question": "q"}]])
def test_other_json_than_questions_is_refused(content, tmp_path):
    (tmp_path / "q.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="expected"):
        read_questions(tmp_path / "q.json")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": None}, "question 1: 'answer' is 'None': expected a text or a list of texts"),
        ({"answer": []}, "question 1: 'answer' is"),
        ({"answer": ["red", None]}, "question 1: 'answer' is"),
        ({"answer": " "}, "question 1: 'answer' is"),
        ({"image": ["a.png", None]}, "question 1: 'image' is"),
        ({"image": {"path": "a.png"}}, "question 1: 'image' is"),
    ],
)
def test_a_question_that_would_score_wrongly_is_refused_by_number(row, message, tmp_path):
    good = {"question": "what?", "answer": "red", "image": "a.png"}
    (tmp_path / "q.json").write_text(json.dumps([good, {**good, **row}]))
    with pytest.raises(DataError, match=re.escape(message)):
        read_questions(tmp_path / "q.json")


def test_any_accepted_answer_is_right_whatever_wrote_the_file(tmp_path):
    rows = [{"question": "how many?", "answer": ["two", 2], "image": ["a.png"]}, {"question": "which?", "answer": 3}]
    (tmp_path / "q.json").write_text("\ufeff" + json.dumps(rows), encoding="utf-8")
    first, second = read_questions(tmp_path / "q.json")
    assert first == Question("how many?", ("two", "2"), ("a.png",)) and second == Question("which?", ("3",))
    assert [judge(first, (), said).correct for said in ("Two.", "2", "three", "", None)] == [True, True] + [False] * 3


@pytest.mark.parametrize(
    ("accepted", "said", "right"),
    [("-5", "5", False), ("-5", "-5.", True), ("0.5", ".50", True), (".5", "5", False), ("C++", "C", False)],
)
def test_signs_and_points_of_numbers_count(accepted, said, right):
    assert Question("?", (accepted,)).accepts(said) is right


def test_empty_answers_are_counted_and_said(capsys):
    question = Question("what?", ("red",))
    (score,) = scores([judge(question, (), said) for said in ("", " ", "red", None)])
    assert (score.correct, score.total, score.empty) == (1, 4, 2)
    show_scores(Console(), [score])
    assert "2 of 4 answers are empty" in capsys.readouterr().out


def test_answers_lie_with_the_model_that_gave_them(tmp_path):
    assert answers_file(str(tmp_path), "cv") == tmp_path / "answers" / "cv.jsonl"
    assert answers_file("owner/model", "cv").parts == ("owner--model", "answers", "cv.jsonl")


def test_an_answer_of_signs_alone_is_not_an_empty_one():
    question = Question("which sign?", ("?",))
    assert [judge(question, (), said).correct for said in ("?", " ? ", "", "!")] == [True, True, False, False]


@pytest.mark.parametrize("question", ["<image>\nWhat?", "What?\n<image>", "<image>"])
def test_a_question_that_shows_an_image_it_does_not_have_is_refused(student, tmp_path, question):
    with pytest.raises(DataError, match=r"media without a file: question 0, .*no 'image' or 'images' for the tag"):
        evaluate(student, [Question(question, ("red",))], tmp_path)
