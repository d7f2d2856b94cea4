"""Evaluation while training: right values, the best checkpoint kept, and the training itself untouched."""

import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback

from tests import tiny
from tests.checkpoints import tensors_of
from tests.evaluation.benchmarks import published
from tests.logs import computed
from visper.common.errors import ConfigError, DataError, TrainingError
from visper.config import Run
from visper.data.images import open_image
from visper.data.rows.records import DropList
from visper.data.rows.sources import open_records
from visper.data.sampler import spread
from visper.evaluation import answer, load_to_ask
from visper.evaluation.contact_sheet import contact_sheet
from visper.evaluation.visualize import SIDE
from visper.evaluation.while_training import evaluator_of
from visper.training import run_stage
from visper.training.best import BEST, best_checkpoint, measured_on
from visper.training.checkpoint import checkpoints
from visper.training.held_out import Evaluator, HeldOut


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return tiny.write_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """Rows and questions on images of their own."""
    folder = tiny.write_rows(tmp_path_factory.mktemp("held"), images=6, text_rows=1, seed=5)
    written = json.loads((folder / "rows.json").read_text())
    questions = [{"question": "What?", "answer": str(n), "image": r["image"], "kind": "ab"[n % 2]}
                 for n, r in enumerate(written) if "image" in r]  # fmt: skip
    (folder / "questions.json").write_text(json.dumps(questions))
    return folder


@pytest.fixture
def make(tiny_llm, tiny_encoder, rows, held_out, tmp_path):
    """Builds a run, with or without evaluation."""

    def build(name, evaluation=None, stage="pt", **changes):
        settings = {
            "name": name,
            "stage": stage,
            "output": str(tmp_path / name),
            "student": {"llm": str(tiny_llm), "encoder": str(tiny_encoder)},
            "data": {"sources": [{"json": str(rows / "rows.json"), "images": str(rows / "images")}], "workers": 0},
            "distillation": tiny.distillation() if stage == "pt" else None,
            "optimization": {"global_batch": 4, "micro_batch": 2, "lr": 1e-2, "max_steps": 4, "precision": "float32"},
            "logging": {"every": 1, "save_every": 3, "keep_checkpoints": 1},
            "evaluation": evaluation,
        }
        for key, value in changes.items():
            settings[key] = {**settings[key], **value}
        return Run.model_validate(settings)

    return build


class _StopBehind(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def losses(folder, **more):
    return {"every": 2, "loss_on": [{"json": str(folder / "rows.json"), "images": str(folder / "images")}], **more}


def asking(folder, **more):
    asked = {"questions": str(folder / "questions.json"), "images": str(folder / "images"), "max_new_tokens": 3}
    return losses(folder, **{**asked, **more})


def train(run, **options):
    """Trains; the logged evaluations by step."""
    run_stage(run, evaluator=evaluator_of(run), **options)
    lines = (Path(run.output) / "log.jsonl").read_text().splitlines()
    found = [entry for entry in map(json.loads, lines) if any(name.startswith("eval/") for name in entry)]
    return {entry["step"]: entry for entry in found}


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_a_run_ends_with_the_same_weights_with_and_without(make, held_out, packing):
    plain, watched = (
        make(name, evaluation, optimization={"packing": packing})
        for name, evaluation in (("plain", None), ("watched", asking(held_out)))
    )
    assert train(plain) == {}
    assert list(train(watched)) == [2, 4]
    ours, theirs = (load_file(f"{run.output}/model/model.safetensors") for run in (watched, plain))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_every_term_is_measured_every_so_often_and_at_the_end(make, held_out):
    found = train(make("run", losses(held_out, every=3)))
    assert list(found) == [3, 4]
    names = {name for name in found[4] if name.startswith("eval/")}
    assert {"eval/loss", "eval/ntp", "eval/depth/1/smooth_l1", "eval/gen/3/info_nce"} <= names
    assert found[4]["eval/ntp"] < found[3]["eval/ntp"] + 1


def test_steps_that_are_evaluated_are_logged_too(make, held_out):
    run = make("run", losses(held_out, every=2))
    train(run)
    assert [entry["step"] for entry in computed(run.output)] == [1, 2, 3, 4]


@pytest.mark.slow
def test_the_time_of_an_evaluation_is_not_that_of_a_step(make, held_out, monkeypatch):
    """Else the throughput of the line after it is that of both."""
    measure, slow = HeldOut.measure, 2.0
    monkeypatch.setattr(HeldOut, "measure", lambda *given: time.sleep(slow) or measure(*given))
    run = make("run", losses(held_out))
    train(run)
    lines = map(json.loads, (Path(run.output) / "log.jsonl").read_text().splitlines())
    assert 0 < max(line["step_s"] for line in lines if "step_s" in line) < slow


def test_rows_that_cannot_be_read_are_left_out_and_named_or_too_many(make, held_out, tmp_path, capfd):
    """Else they are missing from every mean: with one image left, the contrastive loss is zero."""
    broken = shutil.copytree(held_out, tmp_path / "broken")
    (broken / "images" / "2.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"1 of 7 rows \(14.3%\), allowed 1.0%: .* 'rows/2/2'"):
        train(make("refused", losses(broken)))
    found = train(make("run", losses(broken), data={"drop_limit": 0.2}))[4]
    rows = [row for row in json.loads((held_out / "rows.json").read_text()) if row.get("image") != "2.png"]
    (held_out / "good.json").write_text(json.dumps(rows))
    good = [{"json": str(held_out / "good.json"), "images": str(held_out / "images")}]
    only_good = train(make("good", losses(held_out) | {"loss_on": good}))[4]
    assert {n: v for n, v in found.items() if "eval" in n} == {n: v for n, v in only_good.items() if "eval" in n}
    shown = capfd.readouterr().out
    assert "left out 1 held-out row: " in shown and "losses on 6 held-out rows" in shown


def test_the_loss_is_the_mean_over_the_rows_however_they_are_split(make, held_out):
    found = [
        train(make(f"micro-{micro}", losses(held_out), optimization={"micro_batch": micro}))[4] for micro in (1, 4)
    ]
    assert found[0]["eval/ntp"] == pytest.approx(found[1]["eval/ntp"], rel=1e-4)
    assert found[0]["eval/depth/1/info_nce"] == pytest.approx(found[1]["eval/depth/1/info_nce"], rel=1e-4)


def test_accuracies_are_those_of_the_finished_model(make, held_out, tmp_path):
    run = make("run", asking(held_out, best="accuracy/a"))
    questions = json.loads((held_out / "questions.json").read_text())
    # Accept what the finished model of an equal run says to every other question.
    train(make("before"))
    student = load_to_ask(tmp_path / "before")
    for number, row in enumerate(questions):
        said = answer(student, [row["question"]], [[open_image(held_out / "images" / row["image"])]], 3)[0]
        row["answer"] = said if number % 2 == 0 and said else "never"
    (held_out / "right.json").write_text(json.dumps(questions))
    run = make("run", asking(held_out, best="accuracy/a") | {"questions": str(held_out / "right.json")})
    found = train(run)[4]
    right = sum(row["answer"] != "never" for row in questions)
    assert found["eval/accuracy"] == right / len(questions)
    assert found["eval/accuracy/b"] == 0


def test_the_blind_control_is_the_accuracy_with_other_images(make, held_out):
    """An answerer that names what it sees is right on a question's own image, and on no other one."""
    evaluator = evaluator_of(make("run", asking(held_out, blind=True)))
    questions = json.loads((held_out / "questions.json").read_text())
    answers = {row["image"]: row["answer"] for row in questions}
    said = [answers[prompt.images[0]] for prompt in evaluator.answer.prompts]
    assert len(said) == 2 * len(questions)
    found = evaluator.answer.score(said)
    assert (found["accuracy"], found["blind"]) == (1, 0)
    assert found["constant"] == pytest.approx(2 / len(questions))
    swapped = said[len(questions) :] + said[: len(questions)]
    assert (evaluator.answer.score(swapped)["accuracy"], evaluator.answer.score(swapped)["blind"]) == (0, 1)
    assert set(evaluator.values) == set(found)


def test_the_blind_control_is_logged_and_changes_nothing_else(make, held_out):
    plain, blind = (train(make(f"run-{on}", asking(held_out, blind=on)))[4] for on in (False, True))
    assert "eval/blind" not in plain and 0 <= blind["eval/blind"] <= 1
    assert {name for name in blind if name.startswith("eval/")} - set(plain) == {"eval/blind"}
    assert all(blind[name] == plain[name] for name in plain if name.startswith("eval/"))


def test_the_blind_control_needs_other_images(make, held_out):
    one = json.loads((held_out / "questions.json").read_text())[:1]
    (held_out / "one.json").write_text(json.dumps(one))
    with pytest.raises(DataError, match="at least two different images"):
        evaluator_of(make("run", asking(held_out, blind=True) | {"questions": str(held_out / "one.json")}))


def test_the_best_checkpoint_outlives_newer_ones(make, held_out):
    run = make("run", losses(held_out, every=1), optimization={"max_steps": 6}, logging={"save_every": 1})
    found = train(run)
    best = json.loads((Path(run.output) / BEST).read_text())
    assert best["value"] == min(entry["eval/loss"] for entry in found.values()) == found[best["step"]]["eval/loss"]
    kept = [path.name for path in checkpoints(Path(run.output))]
    assert set(kept) == {best["checkpoint"], "checkpoint-6"}


def test_the_finished_model_may_be_the_best_one(make, held_out):
    changes = {"optimization": {"max_steps": 4, "lr": 1e-9}, "logging": {"save_every": 1}}
    run = make("run", losses(held_out, every=1, use_best=True), **changes)
    train(run)
    best = json.loads((Path(run.output) / BEST).read_text())["checkpoint"]
    saved = tensors_of(Path(run.output) / "checkpoints" / best, "weights")
    name = next(name for name in saved if "projector" in name and "weight" in name)
    finished = load_file(Path(run.output) / "model" / "model.safetensors")
    (found,) = (value for key, value in finished.items() if key.split(".")[-2:] == name.split(".")[-2:])
    assert torch.equal(found, saved[name])


@pytest.mark.slow
def test_a_resumed_run_knows_the_best_before(make, held_out):
    whole = make("whole", losses(held_out, every=1), optimization={"max_steps": 6})
    train(whole)
    run = make("run", losses(held_out, every=1), optimization={"max_steps": 6})
    with pytest.raises(KeyboardInterrupt):
        run_stage(run, callbacks=[_StopBehind(3)])
    train(run, resume=True)
    first, second = (json.loads((Path(one.output) / BEST).read_text()) for one in (whole, run))
    assert first == second


def test_an_evaluation_that_fails_leaves_the_model_training(make, held_out):
    seen = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **_):
            seen.append(model)

    def fails(*_):
        raise RuntimeError("cannot answer")

    run = make("fails", losses(held_out))
    with pytest.raises(RuntimeError, match="cannot answer"):
        run_stage(run, evaluator=Evaluator(fails), callbacks=[Watch()])
    assert seen[-1].training


def test_a_measure_that_is_not_there_is_refused_before_the_first_step(make, held_out):
    run = make("run", asking(held_out, best="accuracy/c"))
    with pytest.raises(
        ConfigError, match=r"'accuracy/c', which is not measured: expected one of loss, ntp, depth/1/.*/b$"
    ):
        train(run)
    assert not checkpoints(Path(run.output)) and not (Path(run.output) / "log.jsonl").exists()


@pytest.mark.slow
def test_predictions_are_drawn_and_nothing_else_changes(make, held_out):
    """A sheet for each image: beside the image three tiles for depth and seg (teacher, two layers), two for gen."""
    logging = {"report_to": ["tensorboard"]}
    plain, drawn = (
        make(name, losses(held_out, draw=draw), logging=logging) for name, draw in (("plain", 0), ("drawn", 2))
    )
    train(plain)
    train(drawn)
    ours, theirs = (load_file(Path(run.output) / "model" / "model.safetensors") for run in (plain, drawn))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    output = Path(drawn.output)
    assert not (Path(plain.output) / "drawings").exists()
    sheets = {str(path.relative_to(output / "drawings")) for path in output.glob("drawings/*/*.png")}
    assert sheets == {f"step_00000{step}/{number}.png" for step in (2, 4) for number in (1, 2)}
    read = EventAccumulator(str(output / "tensorboard"))
    read.Reload()
    assert [event.step for event in read.Images("drawings/2")] == [2, 4]
    with Image.open(output / "drawings" / "step_000002" / "1.png") as sheet:
        assert sheet.size == contact_sheet([[("a", sheet)] * 4] * 2 + [[("a", sheet)] * 3], SIDE).size


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "draw"), [("pt", 2), ("ift", 0)])
def test_answers_losses_and_drawings_in_bfloat16(make, held_out, stage, draw):
    evaluation = asking(held_out, blind=True, **({"draw": draw} if draw else {}))
    found = train(make(stage, evaluation, stage=stage, optimization={"precision": "bfloat16"}))
    assert found.keys() == {2, 4} and {"eval/accuracy", "eval/blind", "eval/loss"} <= found[4].keys()


def test_fewer_held_out_rows_than_processes_are_refused(make, held_out):
    run = make("run", losses(held_out, limit=3))
    held = HeldOut(run.evaluation, run.optimization, None, SimpleNamespace(dataset=range(8)))
    with pytest.raises(ConfigError, match=r"leave 3 rows to measure, fewer than the 4 processes"):
        held.measured_order(4)
    assert len(held.measured_order(2)) == 2


def test_drawings_need_teachers(make, held_out):
    with pytest.raises(ValueError, match="shows what teachers see, but this stage has no teachers"):
        make("run", losses(held_out, draw=1), stage="ift")
    with pytest.raises(ValueError, match=r"needs the teachers, but 'distillation\.targets'"):
        make("run", losses(held_out, draw=1), distillation=tiny.distillation(targets="store"))


def test_images_that_are_trained_on_are_pointed_out_whatever_their_names(make, rows, held_out, tmp_path, capfd):
    copied = shutil.copytree(held_out, tmp_path / "copied")
    shutil.copy(rows / "images" / "7.png", copied / "images" / "2.png")
    train(make("run", losses(copied)))
    shown = capfd.readouterr().out.replace("\n", " ")
    assert (
        f"the run trains on 1 image of the held-out rows, such as {copied}/images/2.png ({rows}/images/7.png)" in shown
    )


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({}, "nothing to evaluate"),
        ({"questions": "a.json", "benchmark": "mmstar"}, "not both"),
        ({"questions": "a.json", "best": "loss"}, "not measured without loss_on"),
        ({"loss_on": [{"json": "a", "images": "b", "weight": 7.0}]}, "measured once, whatever its 'weight': remove"),
        ({"loss_on": [{"json": "a", "images": "b"}], "best": "accuracy"}, "not measured without questions"),
        ({"questions": "a.json", "draw": 1}, "'draw' shows images of 'loss_on'"),
        ({"loss_on": [{"json": "a", "images": "b"}], "blind": True}, "'blind' is a control for 'questions'"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(make, evaluation, message):
    with pytest.raises(ValueError, match=message):
        make("run", evaluation)


def test_a_source_without_a_measured_row_is_no_measure(make, held_out):
    """Of 7 and 2 rows, a limit of 3 takes three of the first source."""
    few = json.loads((held_out / "rows.json").read_text())[:2]
    (held_out / "few.json").write_text(json.dumps(few))
    sources = [{"json": str(held_out / f"{name}.json"), "images": str(held_out / "images")} for name in ("rows", "few")]
    run = make("run", losses(held_out, best="ntp/few", limit=3) | {"loss_on": sources})
    with pytest.raises(ConfigError, match=r"'ntp/few', which is not measured: .* loss, ntp, ntp/rows, depth"):
        train(run)


def test_faults_show_before_training(make, held_out):
    with pytest.raises(ConfigError, match="no benchmark 'mmstat': choose one of"):
        evaluator_of(make("run", {"benchmark": "mmstat"}))
    with pytest.raises(ConfigError, match="visper data prepare mmstar"):
        evaluator_of(make("run", {"benchmark": "mmstar"}))


def test_the_accuracy_of_a_benchmark_is_its_overall_score(make, held_out, tmp_path):
    """Rows 0, 1 and 3 of CV-Bench have no COCO image: its last score would be 3D."""
    published.write_cv_bench(tmp_path / "data")
    run = make("run", {"benchmark": "cv-bench"})
    whole = run.model_copy(update={"data": run.data.model_copy(update={"root": str(tmp_path / "data")})})
    assert evaluator_of(whole).values[0] == "accuracy" and "accuracy/CV-Bench" in evaluator_of(whole).values
    assert evaluator_of(whole).answer.score([""] * 5)["constant"] == 0.875  # one of two in Count, all of the rest
    part = whole.model_copy(update={"evaluation": whole.evaluation.model_copy(update={"limit": 3})})
    with pytest.raises(ConfigError, match=r"limit: 3 of the 5 .* Count, Depth, 3D, but not its accuracy, 'CV-Bench'"):
        evaluator_of(part)


def test_a_best_by_another_measure_is_never_taken_for_this_one(make, held_out):
    """The measure may change when a run is resumed: kept are the other one's checkpoints."""
    changes = {"optimization": {"max_steps": 6}, "logging": {"save_every": 1}}
    with pytest.raises(KeyboardInterrupt):
        run_stage(make("run", losses(held_out, every=1, best="ntp"), **changes), callbacks=[_StopBehind(3)])
    run = make("run", losses(held_out, every=1, best="depth/1/smooth_l1", use_best=True), **changes)
    train(run, resume=True)
    best = json.loads((Path(run.output) / BEST).read_text())
    assert (
        best["measure"] == "eval/depth/1/smooth_l1" and (Path(run.output) / "checkpoints" / best["checkpoint"]).is_dir()
    )


def test_values_on_other_rows_are_never_compared(make, held_out, capfd):
    """The log is made to say that the rows before were easier than any row is now."""
    changes = {"optimization": {"max_steps": 6}, "logging": {"save_every": 1}}
    with pytest.raises(KeyboardInterrupt):
        run_stage(make("run", losses(held_out, every=1), **changes), callbacks=[_StopBehind(3)])
    run = make("run", losses(held_out, every=1, limit=4, use_best=True), **changes)
    log = Path(run.output) / "log.jsonl"
    before = [json.loads(line) for line in log.read_text().splitlines()]
    log.write_text("".join(json.dumps({**e, **({"eval/loss": 0} if "eval/loss" in e else {})}) + "\n" for e in before))
    found = train(run, resume=True)
    best = json.loads((Path(run.output) / BEST).read_text())
    assert best["step"] > 3 and best["value"] == min(found[step]["eval/loss"] for step in (4, 5, 6))
    assert "evaluated on other rows or questions than these" in capfd.readouterr().out
    assert len({entry["measured_on"] for entry in found.values()}) == 2
    assert best_checkpoint(Path(run.output), "eval/loss", found[6]["measured_on"]).name == best["checkpoint"]
    with pytest.raises(TrainingError, match=r"chosen on other rows or questions than 'evaluation' names now"):
        best_checkpoint(Path(run.output), "eval/loss", found[3]["measured_on"])


def test_what_was_measured_depends_on_what_the_best_value_reads(make, held_out, tmp_path):
    def on(**changes):
        run = make("run", asking(held_out, **changes))
        rows = open_records([(held_out / "rows.json", held_out / "images")], DropList())
        order = spread(range(len(rows)), run.evaluation.limit)
        return measured_on(run.evaluation, rows, order, evaluator_of(run).asked)

    moved = shutil.copytree(held_out, tmp_path / "moved")
    elsewhere = {"questions": str(moved / "questions.json"), "images": str(moved / "images")}
    assert on() == on(every=5, draw=1) == on(**elsewhere) != on(limit=3) and on() != on(max_new_tokens=4)
    assert on(best="loss") == on(best="ntp", max_new_tokens=4, **elsewhere) != on(best="loss", limit=3)
    questions = json.loads((moved / "questions.json").read_text())
    (moved / "questions.json").write_text(json.dumps([{**questions[0], "answer": "another"}, *questions[1:]]))
    assert on() != on(**elsewhere)
    (moved / "questions.json").write_text(json.dumps(questions))
    Image.new("RGB", (8, 8)).save(moved / "images" / "0.png")
    assert on() != on(**elsewhere)


def test_a_falling_weight_is_not_an_improvement(make, held_out):
    """With a rate of almost zero, the model stays the same, and so does its loss."""
    distillation = tiny.distillation()
    for task in distillation["tasks"].values():
        task["schedule"] = {"end": 0.5}
    changes = {"distillation": distillation, "optimization": {"max_steps": 4, "lr": 1e-12}}
    found = train(make("run", losses(held_out, every=1), **changes))
    assert found[4]["eval/loss"] == pytest.approx(found[1]["eval/loss"], rel=1e-6)


def test_a_run_that_asks_needs_somebody_to_answer(make, held_out):
    with pytest.raises(ConfigError, match="evaluator_of"):
        run_stage(make("run", asking(held_out)))


@pytest.mark.parametrize(
    ("limit", "shown"),
    [(6, "6 held-out rows, in batches of 1 x 4 and 2: info_nce"), (3, "3 held-out rows, in batches of 3: info_nce"),
     (4, "4 held-out rows\n")],
)  # fmt: skip
def test_batches_that_are_not_the_training_s_are_announced(make, held_out, capfd, limit, shown):
    """A contrastive term grows with the number of images that it compares: 4 in the training."""
    train(make("run", losses(held_out, limit=limit)))
    assert f"losses on {shown}" in capfd.readouterr().out


def test_a_limit_is_spread_over_all():
    assert spread(range(10), 4) == [0, 2, 5, 7] and spread(range(3), 4) == [0, 1, 2]
