"""The study: what its texts say, what its arms change, and that a comparison runs, stops and goes on."""

import json
import math
import shutil
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from visper.common.console import Console
from visper.common.errors import ConfigError, TrainingError
from visper.common.lock import locked
from visper.config import load_run
from visper.evaluation.probe.curves import SCORES, save_findings
from visper.evaluation.probe.measures import Finding
from visper.model import load_student
from visper.model.encoders import load_encoder
from visper.quickstart import BASES
from visper.quickstart.language import DEPTHS
from visper.quickstart.questions import KINDS, draw_questions
from visper.quickstart.run import Stopwatch
from visper.quickstart.scenes import draw_scene
from visper.quickstart.tower import TowerTeacher
from visper.quickstart.world import HELD_OUT_SERIES
from visper.study import cells as study_cells
from visper.study import run as study_run
from visper.study.arms import ARMS, FAST, FEEDING, FULL, NOTHING, PUBLISHED
from visper.study.cells import Cell, needs, pre_training, train_whole
from visper.study.controls import SCALE, ShuffledTeacher, StudyTower, save_tower
from visper.study.report import compare, draw, labels_in_words, labels_needed, report
from visper.study.run import finish, prepare_start, probe, require_upper_mark, study
from visper.study.world import instruct_records, pretrain_records

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def objects():
    return [draw_scene(5, index).objects for index in range(40)]


def test_pre_training_texts_name_places_and_never_depth(objects):
    text = json.dumps(list(pretrain_records(objects, np.random.default_rng(0))))
    words = set(text.replace('"', " ").split())
    assert {"x3", "y4"} <= words and not words & set(DEPTHS)


def test_fewer_labels_are_among_more(objects):
    questions = draw_questions(objects, 5)
    few, more = (list(instruct_records(objects, questions, 5, number)) for number in (10, 30))
    assert few == more[: len(few)] and len(few) < len(more)
    asked = sum(len(row["conversations"]) // 2 for row in few)
    assert 10 <= asked < 30


def test_a_fast_study_asks_questions_of_every_kind_with_every_default_seed():
    for seed in range(1, 6):
        scenes = [draw_scene(seed + HELD_OUT_SERIES, index).objects for index in range(FAST.held_out)]
        assert {one.kind for one in draw_questions(scenes, seed + HELD_OUT_SERIES, FAST.per_kind)} == set(KINDS)


def test_shuffled_targets_are_those_of_the_image_before():
    plain, shuffled = TowerTeacher(BASES / "teacher_depth"), ShuffledTeacher(BASES / "teacher_depth")
    pixels = torch.randn(3, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(shuffled.encode(pixels), plain.encode(pixels)[[2, 0, 1]])
    with pytest.raises(ValueError, match="micro_batch to 2"):
        shuffled.encode(pixels[:1])


def test_a_tower_gives_standardized_states_and_places(tmp_path):
    images = torch.randn(8, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    save_tower(BASES / "encoder_contrastive", images, tmp_path / "tower")
    tower = StudyTower.from_pretrained(tmp_path / "tower").eval()
    width = tower.encoder.config.hidden_size
    states, places = tower(images).last_hidden_state.split([width, 16], dim=-1)
    torch.testing.assert_close(states.flatten(0, 1).std(0), torch.full((width,), SCALE))
    assert places[0, 8 * 4 + 3].nonzero().flatten().tolist() == [3, 8 + 4]
    assert load_encoder(str(tmp_path / "tower"), -1).num_tokens == 64


@pytest.mark.slow
def test_the_fed_student_reads_the_teachers_tokens_and_begins_where_the_others_do(tmp_path):
    prepare_start(tmp_path, FAST, QUIET)
    plain, fed = (load_student(tmp_path / name).model.eval() for name in ("start", "start_fed"))
    pixels = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    told = fed.model.vision_tower(pixels).last_hidden_state[..., -128:-64]
    torch.testing.assert_close(told, SCALE * TowerTeacher(BASES / "teacher_depth").encode(pixels / 2))
    ours, theirs = (torch.stack(list(one.model.get_image_features(pixels).pooler_output)) for one in (fed, plain))
    torch.testing.assert_close(ours, theirs)


def test_every_arm_differs_from_the_one_without_supervision_in_one_thing(tmp_path):
    changed = {}
    for name, arm in ARMS.items():
        recipes = [load_run(arm.pt), load_run(arm.ift)]
        base = [load_run("study/pt"), load_run("study/ift")]
        differ = [
            key
            for one, other in zip(recipes, base, strict=True)
            for key in ("data", "optimization", "lora", "stage", "seed", "start_from", "student")
            if getattr(one, key) != getattr(other, key)
        ]
        assert differ == [], name
        changed[name] = [run.distillation is not None for run in recipes]
    assert changed[NOTHING] == changed[FEEDING] == [False, False]
    assert all(sum(found) == (ARMS[name].supervised is not None) for name, found in changed.items())


def test_arms_that_fine_tune_otherwise_share_one_pre_training(tmp_path):
    gram, plain = (Cell(tmp_path, ARMS[name], 3, FAST, 0.5) for name in ("gram in IFT", NOTHING))
    assert pre_training(gram, {}).output == pre_training(Cell(tmp_path, plain.arm, 3, FAST), {}).output
    published = pre_training(Cell(tmp_path, ARMS[PUBLISHED], 3, FAST, 0.5), {})
    assert {task.weight for task in published.distillation.tasks.values()} == {0.5}


def test_labels_needed_lie_between_measured_numbers_on_a_logarithmic_scale():
    curve = {100: 0.5, 400: 0.7, 1600: 0.7}
    assert labels_needed(curve, 0.6) == pytest.approx(200)
    assert labels_needed(curve, 0.4) == 100
    assert labels_needed(curve, 0.8) == math.inf


def test_learning_curves_show_every_kind_on_the_same_scale(tmp_path, monkeypatch):
    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *args, **kw: (drawn.append(figure), save(figure, *args, **kw))
    )
    kinds = {"relation": [99, 100], "depth": [60, 100], "nearest": [0, 100]}
    draw({NOTHING: {0: {"labels": {"20": kinds, "40": kinds}}}}, [20, 40], tmp_path / "curves.svg")
    scales = [axis.get_ylim() for axis in drawn[0].axes if axis.lines]
    assert len(scales) == 4 and len(set(scales)) == 1
    assert scales[0][0] <= 0 and scales[0][1] >= 1


def test_labels_needed_at_either_end_of_what_was_measured_are_bounds():
    assert [labels_in_words(needed, [250, 1000]) for needed in (250, 400.4, math.inf)] == ["<= 250", "400", "> 1000"]


def test_differences_are_paired_by_seed():
    def cell(right):
        return {"labels": {"20": {"depth": [right, 100], "count": [50, 100]}}}

    results = {NOTHING: {0: cell(50), 1: cell(60), 2: cell(10)}, PUBLISHED: {0: cell(52), 1: cell(64)}}
    depth, _, mean = compare(results, 20)
    assert (depth.mean, mean.mean) == (pytest.approx(3), pytest.approx(1.5))
    assert depth.high - depth.mean == pytest.approx(12.7062 * math.sqrt(2) / math.sqrt(2), rel=1e-4)


def test_one_seed_has_no_table_of_differences(tmp_path):
    cell = {0: {"labels": {"20": {"depth": [50, 100]}}, "cosines": {}}}
    probes = {NOTHING: [Finding("depth/1", "cosine", 0.1, {})]}
    report({NOTHING: cell, PUBLISHED: cell}, probes, [20], tmp_path, Console(file=(shown := StringIO()), width=200))
    assert shown.getvalue().count("arm") == 2  # accuracies and labels needed


def test_a_cell_that_another_process_runs_is_left_to_it_at_first(tmp_path, monkeypatch):
    ran = []

    def run_cell(cell, weights, console):
        ran.append(cell.seed)
        if cell.seed == 2:
            release()
        cell.result.write_text(json.dumps({"seed": cell.seed}))

    monkeypatch.setattr(study_cells, "run_cell", run_cell)
    cells = [Cell(tmp_path, ARMS[NOTHING], seed, FAST) for seed in (1, 2)]
    held = locked(cells[0].place, QUIET)
    held.__enter__()

    def release():
        held.__exit__(None, None, None)

    assert [row["seed"] for row in finish(cells, {}, QUIET)] == [1, 2]
    assert ran == [2, 1]


def test_probes_that_another_process_runs_are_left_to_it_and_finished_ones_need_no_model(tmp_path, monkeypatch):
    ran = []

    def probe_world(model, world, bases, judged, length, out):
        ran.append(out.parent.name)
        if ran == ["published-0.1"]:
            release()
        out.mkdir()
        save_findings([Finding("depth/1", "cosine", 0.5, {})], out / SCORES)

    monkeypatch.setattr(study_cells, "probe_world", probe_world)
    monkeypatch.setattr(study_cells, "train_whole", lambda *_: None)
    monkeypatch.setattr(study_cells, "prepare_world", lambda *_: None)
    cells = [Cell(tmp_path, ARMS[NOTHING], 1, FAST), Cell(tmp_path, ARMS[PUBLISHED], 1, FAST, 0.1)]
    held = locked(cells[0].place, QUIET)
    held.__enter__()

    def release():
        held.__exit__(None, None, None)

    assert set(probe(cells, QUIET)) == {NOTHING, PUBLISHED}
    assert ran == ["published-0.1", "nothing"]
    monkeypatch.setattr(study_cells, "train_whole", None)
    assert probe(cells, QUIET)[NOTHING][0].value == 0.5


def test_an_arm_of_equal_compute_runs_what_says_its_steps_first(tmp_path):
    more = Cell(tmp_path, ARMS["more data, equal compute"], 3, FAST)
    assert [need.arm.name for need in needs(more, {PUBLISHED: 0.1})] == [NOTHING, PUBLISHED]
    assert pre_training(more, {NOTHING: 10.0, PUBLISHED: 15.0}).optimization.max_steps == FAST.pt_steps * 1.5
    assert [need.arm.name for need in needs(Cell(tmp_path, ARMS["gram in IFT"], 3, FAST), {})] == [NOTHING]


def test_a_setting_whose_upper_mark_is_no_higher_is_refused(tmp_path):
    for arm, right in ((NOTHING, 50), (FEEDING, 52)):
        result = Cell(tmp_path, ARMS[arm], study_run.CHOOSING_SEED, FAST).result
        result.parent.mkdir(parents=True)
        result.write_text(json.dumps({"labels": {"20": {"nearest": [0, 9], "depth": [right, 100]}}}))
    require_upper_mark(tmp_path, FAST, QUIET)
    strict = replace(FAST, margin=0.05)
    with pytest.raises(
        TrainingError, match=r"answers 52.0% of the questions, 'nothing' 50.0%: expected at least 5 points"
    ):
        require_upper_mark(tmp_path, strict, QUIET)


def test_an_interrupted_stage_begins_again_so_that_its_cost_is_that_of_all_steps(tmp_path, monkeypatch):
    run = pre_training(Cell(tmp_path, ARMS[NOTHING], 3, FAST), {})
    left = Path(run.output) / "checkpoints"
    left.mkdir(parents=True)
    monkeypatch.setattr(study_cells, "run_stage", lambda run, followed: Path(run.output).mkdir())
    seconds = Stopwatch(tmp_path / "seconds.json")
    with pytest.raises(KeyboardInterrupt), seconds("pt"):
        seconds.cpu["pt"] = 1e6
        raise KeyboardInterrupt
    train_whole(run, seconds, "pt", QUIET)
    assert Path(run.output).exists() and not left.exists() and seconds.cpu["pt"] < 1e6


def test_a_finished_stage_of_unknown_cost_is_trained_again(tmp_path, monkeypatch):
    monkeypatch.setattr(study_cells, "is_finished", lambda _: True)
    trained = []
    monkeypatch.setattr(study_cells, "run_stage", lambda run, followed: trained.append(run))
    seconds = Stopwatch(tmp_path / "seconds.json")  # a process killed before it wrote them
    run = pre_training(Cell(tmp_path, ARMS[NOTHING], 3, FAST), {})
    for _ in range(2):
        train_whole(run, seconds, "pt", QUIET)
    assert trained == [run] and "pt" in seconds.cpu


def test_what_cannot_be_compared_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="--arm better: expected some of nothing"):
        study(tmp_path, [0], FAST, QUIET, ["better"])
    with pytest.raises(ConfigError, match="every arm is compared with 'nothing': add --arm nothing"):
        study(tmp_path, [0], FAST, QUIET, [PUBLISHED])
    study_run._require_same(tmp_path, FAST)
    study_run._require_same(tmp_path, FAST)
    with pytest.raises(ConfigError, match="holds results of another size, which cannot be compared"):
        study_run._require_same(tmp_path, FULL)
    kept = tmp_path / "study.json"
    kept.write_text(kept.read_text().replace('"lr": 0.0005', '"lr": 0.001'))
    with pytest.raises(ConfigError, match="another study/ift, study/ift-gram"):
        study_run._require_same(tmp_path, FAST)


class Closed(StringIO):
    """A pipe that nobody reads."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


@pytest.mark.slow
def test_a_comparison_runs_whole_and_reads_what_is_finished(tmp_path, monkeypatch):
    arms = (NOTHING, PUBLISHED, "gram in IFT")
    first, probes = study(tmp_path, [0], FAST, QUIET, arms)
    asked = {kind: right_asked[1] for kind, right_asked in first[PUBLISHED][0]["labels"]["40"].items()}
    assert set(asked) == {"count", "relation", "depth", "distance", "nearest"} and min(asked.values()) > 0
    assert set(first[PUBLISHED][0]["cosines"]) == {"depth/2", "depth/4", "seg/2", "seg/3", "gen/3", "gen/4"}
    steps = first[PUBLISHED][0]["steps"]
    assert steps == {"pt": 4, "ift-20": 2, "ift-40": 3}
    with pytest.raises((BrokenPipeError, SystemExit)):  # as in `| head`: everything has been written
        report(first, probes, list(FAST.labels), tmp_path, Console(file=Closed()))
    assert all((tmp_path / name).read_text().startswith("<?xml") for name in ("curves.svg", "probes.svg"))
    assert set(probes) == {NOTHING, PUBLISHED} and {f.name for f in probes[NOTHING]} >= {"depth/1", "seg/4"}
    content = json.loads((tmp_path / "report.json").read_text())
    assert set(content["accuracies"]) == set(arms) and content["differences"]["40"] == {NOTHING: []}
    gram = Cell(tmp_path, ARMS["gram in IFT"], 0, FAST, first["gram in IFT"][0]["weight"])
    gram.result.unlink()
    shutil.rmtree(pre_training(gram, {}).output)
    again, _ = study(tmp_path, [0], FAST, QUIET, arms)
    assert again["gram in IFT"][0]["labels"] == first["gram in IFT"][0]["labels"]
    monkeypatch.setattr(study_cells, "run_stage", None)
    first["gram in IFT"] = again["gram in IFT"]
    assert study(tmp_path, [0], FAST, QUIET, arms) == (first, probes)
