"""Every question is asked once, whatever the batch, the order, the number of processes, or what interrupts."""

import json
import logging
import signal
from dataclasses import replace

import pytest
import torch
from PIL import Image

from visper.common.errors import DataError, StoppedError
from visper.config import Geometry
from visper.config import Student as StudentConfig
from visper.evaluation import asking
from visper.evaluation.asking import Answers, Asker, Prompt, ask_all, model_key, other_images
from visper.evaluation.image_sources import ImageFolder
from visper.evaluation.questions import Question, ask_questions
from visper.model import build_student, save_student

WORDS = ["Which", "sphere", "is", "closer", "to", "the", "camera", "?"]


@pytest.fixture(scope="module")
def student(tiny_llm, tiny_encoder):
    """Large random weights, so that answers differ from question to question."""
    torch.manual_seed(0)
    student = build_student(StudentConfig(llm=str(tiny_llm), encoder=str(tiny_encoder)), Geometry.SQUASH)
    with torch.no_grad():
        for weight in student.model.parameters():
            if weight.dim() == 2:
                weight.normal_(std=0.5)
    return student


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(8):
        image = Image.effect_mandelbrot((20, 16), (-2, -1, 1, 1), 10 + 9 * i).convert("RGB")
        image.save(folder / f"{i}.png")
    return ImageFolder(folder)


PROMPTS = [Prompt("", " ".join(WORDS[i % 8 :]), (f"{(i + i // 8) % 8}.png",) if i < 12 else ()) for i in range(16)]


def no_student():
    raise AssertionError("nothing was left to ask")


def said(prompts, answers):
    return [answers.get(prompt) for prompt in prompts]


def test_a_batch_of_eight_gives_the_answers_of_one(student, images):
    together, apart = Answers(None, images, max_new_tokens=12), Answers(None, images, max_new_tokens=12)
    ask_all(lambda: student, PROMPTS, together, batch_size=8)
    ask_all(lambda: student, PROMPTS, apart, batch_size=1)
    assert said(PROMPTS, together) == said(PROMPTS, apart)
    assert None not in said(PROMPTS, apart) and len(set(said(PROMPTS, apart))) > 8  # or the test would see nothing


def test_what_was_interrupted_goes_on_by_question_in_any_order(student, images, tmp_path, monkeypatch):
    whole = Answers(None, images, max_new_tokens=4)
    ask_all(lambda: student, PROMPTS, whole)
    asked = []

    def counting(student, prompts, shown, length, generate):
        asked.extend(prompts)
        if len(asked) == 8:
            raise KeyboardInterrupt
        return answer(student, prompts, shown, length, generate)

    answer = asking.answer
    monkeypatch.setattr(asking, "answer", counting)
    file = tmp_path / "answers.jsonl"
    with pytest.raises(KeyboardInterrupt):
        ask_all(lambda: student, PROMPTS, Answers(file, images, "m", 4), batch_size=4)
    with (tmp_path / "answers.jsonl.part-0").open("a") as part:
        part.write('{"key": "cut off')
    again = Answers(file, images, "m", 4, process=0)
    before = len(asked)
    ask_all(lambda: student, PROMPTS[::-1], again, batch_size=4)
    assert said(PROMPTS, again) == said(PROMPTS, whole)
    assert len(asked) - before == 16 - 4 and len(set(PROMPTS)) == 16  # four were kept, four were not
    ask_all(no_student, PROMPTS, Answers(file, images, "m", 4), batch_size=4)


@pytest.mark.parametrize("other", [("n", 4), ("m", 5)], ids=["another model", "longer answers"])
def test_answers_of_another_model_or_length_are_not_met(other, images, tmp_path):
    kept = Answers(tmp_path / "a.jsonl", images, "m", 4)
    kept.add({PROMPTS[0]: "yes"})
    assert Answers(tmp_path / "a.jsonl", images, "m", 4).get(PROMPTS[0]) == "yes"
    assert Answers(tmp_path / "a.jsonl", images, *other).get(PROMPTS[0]) is None


def test_a_model_trained_again_in_its_place_is_another_model(student, tmp_path):
    save_student(student, tmp_path / "out" / "model")
    before = model_key(str(tmp_path / "out"))
    assert before == model_key(str(tmp_path / "out")) == model_key(str(tmp_path / "out" / "model"))
    (tmp_path / "out" / "model").rename(tmp_path / "old")
    save_student(student, tmp_path / "out" / "model")
    assert model_key(str(tmp_path / "out")) != before


def test_an_edited_card_is_no_other_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    before = model_key(str(tmp_path))
    (tmp_path / "README.md").write_text("# Mine")
    assert model_key(str(tmp_path)) == before
    (tmp_path / "config.json").write_text("{ }")
    assert model_key(str(tmp_path)) != before


@pytest.fixture
def asked(monkeypatch):
    """Pretends to answer with the color of the first image. Returns the texts that were asked."""
    texts = []

    def answer(student, prompts, shown, length, generate):
        texts.extend(prompts)
        return [str(images[0].getpixel((0, 0))) for images in shown]

    monkeypatch.setattr(asking, "answer", answer)
    monkeypatch.setattr(asking, "load_to_ask", lambda model: None)
    return texts


def fill(folder, name, color):
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8), color).save(folder / name)
    return ImageFolder(folder)


def test_an_answer_about_another_image_of_that_name_is_not_met(asked, tmp_path):
    """In another folder, and replaced in its own."""
    asker, prompt, file = Asker(str(tmp_path)), Prompt("", "which color?", ("0.png",)), tmp_path / "a.jsonl"
    for folder, color in (("one", (255, 0, 0)), ("other", (0, 0, 255)), ("one", (0, 255, 0))):
        source = fill(tmp_path / folder, "0.png", color)
        assert asker.ask([prompt], source, file, 4).get(prompt) == str(color)
    assert len(asked) == 3


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_what_a_command_does_not_ask_keeps_the_answers_of_earlier_ones(asked, images, tmp_path):
    """Without the blind control, with fewer questions, with another length: the answers are there when asked again."""
    asker, file = Asker(str(tmp_path)), tmp_path / "a.jsonl"
    questions = [Question(f"what is {i}?", ("red",), (f"{i}.png",)) for i in range(4)]
    ask_questions(asker, questions, images, file, 4, blind=True)
    whole = rows_of(file)
    ask_questions(asker, questions, images, file, 4, blind=False)
    ask_questions(asker, questions[:1], images, file, 4, blind=False)
    assert [row["question"] for row in rows_of(file) if "earlier" not in row] == ["what is 0?"]
    assert len(rows_of(file)) == len(asked) == 8
    ask_questions(asker, questions, images, file, 5, blind=False)
    assert len(asked) == 8 + 4
    ask_questions(asker, questions, images, file, 4, blind=True)
    assert len(asked) == 8 + 4 and rows_of(file)[:8] == whole


def test_an_interrupted_control_keeps_its_answers_when_only_the_questions_are_asked(asked, images, tmp_path):
    asker, file = Asker(str(tmp_path)), tmp_path / "a.jsonl"
    questions = [Question("what?", ("red",), (f"{i}.png",)) for i in range(2)]
    asker.ask([replace(questions[0].prompt, images=("1.png",))], images, file, 4)  # an answer of the control, in a part
    ask_questions(asker, questions[:1], images, file, 4, blind=False)
    assert len(asked) == 2 and not list(tmp_path.glob("*.part-*"))
    ask_questions(asker, questions, images, file, 4, blind=True)
    assert len(asked) == 2, "the control asks the same two questions about the same two images"


def test_answers_of_a_model_before_its_training_are_dropped(asked, images, tmp_path):
    file, questions = tmp_path / "a.jsonl", [Question("what?", ("red",), ("0.png",))]
    (tmp_path / "model").mkdir()
    for weights in ("before", "after"):
        (tmp_path / "model" / "weights").write_text(weights)
        ask_questions(Asker(str(tmp_path / "model")), questions, images, file, 4)
    assert len(asked) == 2 and len(rows_of(file)) == 1


def test_an_image_under_another_name_or_in_another_folder_keeps_its_answer(asked, tmp_path):
    asker, file = Asker(str(tmp_path)), tmp_path / "a.jsonl"
    for folder, name in (("one", "0.png"), ("one", "copy.png"), ("other", "0.png")):
        asker.ask([Prompt("", "which color?", (name,))], fill(tmp_path / folder, name, "red"), file, 4)
    assert len(asked) == 1


def test_an_answer_in_another_precision_is_not_met(asked, images, tmp_path, monkeypatch):
    for gpu in (False, True, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        Asker(str(images.folder)).ask(PROMPTS[:1], images, tmp_path / "a.jsonl", 4)
    assert len(asked) == 2


def test_an_answer_by_another_version_of_the_code_is_not_met(asked, images, tmp_path, monkeypatch):
    for release in ("5.0", "5.1", "5.1"):
        monkeypatch.setattr("transformers.__version__", release)
        Asker(str(images.folder)).ask(PROMPTS[:1], images, tmp_path / "a.jsonl", 4)
    assert len(asked) == 2


def test_shares_are_disjoint_and_complete_also_where_some_is_answered(student, images, tmp_path):
    file = tmp_path / "a.jsonl"
    ask_all(lambda: student, PROMPTS[3:7], Answers(file, images, "m", 2))
    for process in range(3):  # each sees what those before it have answered meanwhile
        ask_all(lambda: student, PROMPTS, Answers(file, images, "m", 2, process), 4, (process, 3))
    ask_all(no_student, PROMPTS, Answers(file, images, "m", 2))
    rows = [
        json.loads(line) for part in tmp_path.glob("a.jsonl.part-*") for line in part.read_text().split("\n") if line
    ]
    assert len(rows) == len({row["key"] for row in rows}) == 16


def test_only_a_launchers_environment_makes_a_share(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert asking.own_share() == (0, 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert asking.own_share() == (1, 8)


@pytest.mark.parametrize("batch", [4, 16])
def test_told_to_stop_it_ends_after_the_batch_also_after_the_last_one(batch, student, images, tmp_path):
    def told():
        signal.raise_signal(signal.SIGTERM)
        return student

    answers = Answers(tmp_path / "a.jsonl", images, "m", 2)
    with pytest.raises(StoppedError, match=f"{batch} of 16 questions answered; to go on, repeat the command"):
        ask_all(told, PROMPTS, answers, batch)
    ask_all(lambda: student, PROMPTS, Answers(tmp_path / "a.jsonl", images, "m", 2))


def test_an_unreadable_image_is_asked_again_once_it_is_mended(student, images, tmp_path, caplog):
    asker = Asker(str(tmp_path))
    asker._student = student
    file = images.folder / "0.png"
    content = file.read_bytes()
    file.write_bytes(content[:40])
    questions = [Question("what?", ("red",), ("0.png",)), Question("what?", ("red",), ("1.png",))]
    with caplog.at_level(logging.WARNING):
        own, blind = ask_questions(asker, questions, images, tmp_path / "a.jsonl", 2)
    assert [row.said is None for row in own] == [True, False] and [row.said is None for row in blind] == [False, True]
    assert "their questions count as unanswered" in caplog.text
    file.write_bytes(content)
    own, _ = ask_questions(asker, questions, images, tmp_path / "a.jsonl", 2)
    assert all(row.said is not None for row in own)


def test_no_question_is_shown_its_own_image_in_the_blind_control():
    for count in (2, 3, 7, 8):
        own = [(f"{i}.png",) for i in range(count)] * 2 + [()]
        others = other_images(own)
        assert others == other_images(own) and others[-1] == ()
        assert all(a != b for a, b in zip(own[:-1], others[:-1], strict=True)) and set(others) == set(own)
    assert other_images([("a.png",), ("a.png",), ()]) is None


def test_no_image_of_a_question_is_in_its_blind_control():
    own = [("a", "b"), ("c", "d", "c"), ("e",), ("f", "a")]
    others = other_images(own)
    assert [len(names) for names in others] == [2, 3, 1, 2] and others[1][0] == others[1][2] != others[1][1]
    assert not any(set(a) & set(b) for a, b in zip(own, others, strict=True))
    assert other_images([("a", "b"), ("c", "a")]) is None, "two others are needed, one is there"


def test_absent_images_are_named_before_a_model_is_loaded(images):
    with pytest.raises(DataError, match=r"1 image of the questions cannot be found, the first is 'no\.png'"):
        ask_all(no_student, [Prompt("", "what?", ("no.png",))], Answers(None, images))


def test_what_cannot_be_a_path_is_refused_as_in_rows_and_in_short(images):
    with pytest.raises(
        DataError, match=r"bad image path: question 0, 'what\?': .* cannot be the name of a file"
    ) as error:
        ask_all(no_student, [Prompt("", "what?", ("iVBORw0KGgo" * 10_000,))], Answers(None, images))
    assert len(str(error.value)) < 500
