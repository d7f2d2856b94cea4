"""The photographs recipe on real photographs, a real encoder and a real teacher; only the LLM is tiny and random."""

import json
import math
from pathlib import Path

import pytest
from transformers import AutoProcessor

from visper.config import load_run
from visper.model import load_student
from visper.training import run_stage

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
pytest.importorskip("timm")

pytestmark = pytest.mark.slow

ROWS, STEPS = 6, 2
DEEPLAB = ("models", "deeplabv3-mnv2-voc", "deeplab_v3_1_default_1.onnx")


@pytest.fixture(scope="module")
def first_rows(beside_project, tmp_path_factory):
    """A few rows of the captioned photographs and the folder their pictures lie in."""
    photos = beside_project("photos")
    rows = json.loads((photos / "pretrain.json").read_text(encoding="utf-8"))[:ROWS]
    file = tmp_path_factory.mktemp("photographs") / "rows.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    return {"json": str(file), "images": str(photos)}


@pytest.fixture(scope="module")
def changes(beside_project, tiny_llm, first_rows):
    """What turns the shipped recipe into two steps of a tiny LLM, tapped at layers that it has."""
    teacher = {"model": str(beside_project(*DEEPLAB)), "threads": 1}
    return {
        "student": {"llm": str(tiny_llm), "encoder": str(beside_project("models", "efficientnet-lite0"))},
        "data": {"sources": [first_rows]},
        "distillation": {"tasks": {task: {"target": teacher, "layers": [2, 4]} for task in ("seg", "gen")}},
        "optimization": {"global_batch": 3, "micro_batch": 3, "max_steps": STEPS},
        "logging": {"every": 1, "save_every": 100},
    }


@pytest.fixture(scope="module")
def pre_trained(changes, tmp_path_factory):
    """The output of the recipe's pre-training, shortened."""
    out = tmp_path_factory.mktemp("runs") / "pt"
    run_stage(load_run("photographs/pt", [f"output={out}"], changes=[changes]))
    return out


def logs_of(out: Path) -> list[dict[str, float]]:
    lines = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


def test_every_embedding_loss_is_finite_and_not_zero(pre_trained):
    steps = logs_of(pre_trained)
    terms = {
        f"{task}/{layer}/{kind}" for task in ("seg", "gen") for layer in (2, 4) for kind in ("smooth_l1", "info_nce")
    }
    assert len(steps) == STEPS
    for step in steps:
        assert terms <= step.keys()
        assert all(math.isfinite(step[term]) and step[term] > 0 for term in terms)


def test_targets_differ_from_photograph_to_photograph(changes, first_rows):
    from visper.data.images import open_image
    from visper.distillation.teachers.tasks import build_teachers

    pictures = [
        open_image(Path(first_rows["images"]) / row["image"])
        for row in json.loads(Path(first_rows["json"]).read_text(encoding="utf-8"))[:2]
    ]
    run = load_run("photographs/pt", changes=[changes])
    teachers = build_teachers(run.distillation, run.optimization.precision)
    assert (teachers["seg"].spec.grid, teachers["gen"].spec.tokens) == ((8, 8), 1)
    for teacher in teachers.values():
        one, other = teacher(teacher.see(pictures))
        assert (one - other).abs().mean() > 0.05 * one.abs().mean()


def test_fine_tuning_starts_from_it_and_leaves_a_student_that_answers(pre_trained, changes, first_rows):
    from visper.data.images import open_image
    from visper.evaluation import answer

    out = pre_trained.parent / "ift"
    shared = {key: changes[key] for key in ("data", "optimization", "logging")}
    run_stage(load_run("photographs/ift", [f"output={out}", f"start_from={pre_trained}"], changes=[shared]))
    assert all(math.isfinite(step["ntp"]) for step in logs_of(out))
    picture = open_image(next(Path(first_rows["images"]).rglob("*.jpg")))
    assert isinstance(answer(load_student(out), ["What is in the photo?"], [[picture]], 4)[0], str)
    assert AutoProcessor.from_pretrained(out / "model").tokenizer.convert_tokens_to_ids("<|seg_1|>") > 0


def test_questions_about_photographs_are_asked_with_their_controls(pre_trained, beside_project, tmp_path):
    from visper.data.sampler import spread
    from visper.evaluation.asking import Asker
    from visper.evaluation.question_files import open_questions
    from visper.evaluation.questions import ask_questions
    from visper.evaluation.scores import blind_scores, scores

    photos = beside_project("photos")
    questions, images = open_questions(photos / "questions.json", photos)
    asked = spread(questions, 12)
    own, control = ask_questions(Asker(str(pre_trained), 4), asked, images, tmp_path / "answers.jsonl", 4)
    assert [row.expected for row in own] == [question.answers for question in asked]
    assert all(
        one.said is not None and set(one.images).isdisjoint(other.images)
        for one, other in zip(own, control, strict=True)
    )
    (score,) = scores(own)
    assert score.total == 12 and score.constant >= 1 and blind_scores(control)["all"].total == 12
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 24
