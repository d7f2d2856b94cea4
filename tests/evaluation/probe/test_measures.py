"""What layers are scored by: values worked out by hand, on small sets in the published layout."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from safetensors.torch import load_file

from tests import tiny, tiny_teachers
from visper.common.errors import ConfigError
from visper.config import Geometry, load_run
from visper.config import Student as StudentConfig
from visper.distillation.teachers.segment_maps import Segmentation
from visper.evaluation import wilson
from visper.evaluation.predictions import load_pre_trained
from visper.evaluation.probe.curves import draw_curves, read_findings, save_findings
from visper.evaluation.probe.measures import (
    OTHER,
    TEACHER,
    TIES_WRONG,
    Finding,
    _class_map,
    centered_cosine,
    coco_findings,
    cosine_findings,
    da2k_findings,
    mean_iou,
)
from visper.evaluation.probe.recipe import probe_run, teacher_targets_of, write_rows
from visper.model import build_student, save_student
from visper.training import run_stage


def test_a_value_is_judged_beside_its_controls():
    controls = {"mean map": 0.3, "teacher": 0.1}
    assert Finding("depth/2", "depth error", 0.2, controls, higher=False).beats_controls
    assert not Finding("depth/2", "depth error", 0.4, controls, higher=False).beats_controls


def test_what_all_images_share_earns_nothing():
    mean = torch.full((2, 3), 100.0)
    own = torch.tensor([[[1.0, 0, 0], [0, 0, 0]], [[0, 1.0, 0], [0, 0, 0]]])
    assert centered_cosine(own + mean, own + mean, mean).tolist() == pytest.approx([1.0, 1.0], abs=1e-4)
    assert centered_cosine((own + mean).roll(1, 0), own + mean, mean).tolist() == pytest.approx([0.0, 0.0], abs=1e-4)


def test_mean_iou_is_over_the_classes_in_the_exact_map():
    exact = torch.tensor([[0, 0], [1, 255]])
    # Class 0: 1 of 2; class 1: 1 of 1. Class 2 is not in the image, so it counts only as missing pixels of class 0, as
    # in the published scorer. The ignored pixel counts nowhere.
    assert mean_iou(torch.tensor([[0, 2], [1, 7]]), exact) == pytest.approx((0.5 + 1) / 2)
    assert mean_iou(exact, exact) == 1.0


def test_an_id_map_becomes_a_class_map(tmp_path):
    ids = np.array([[[1, 2, 0], [5, 0, 1]]], dtype=np.uint8)  # 1 + 256 * 2, 5 + 65536
    Image.fromarray(ids).save(tmp_path / "map.png")
    assert _class_map(tmp_path / "map.png", {513: 7}, (1, 2)).tolist() == [[7, 255]]


@pytest.fixture(scope="module")
def probed(tmp_path_factory, tiny_llm, tiny_encoder):
    """A probe of one step, of depth and segmentation, on an untrained student; the folder of its model beside it."""
    folder = tmp_path_factory.mktemp("probe")
    places = {
        "depth": ("depth_anything", 56, tiny_teachers.save(tiny_teachers.depth_model(), folder / "depth")),
        "seg": ("oneformer", 64, tiny_teachers.save_oneformer(folder / "seg")),
    }
    parts = StudentConfig.model_validate({"llm": str(tiny_llm), "encoder": str(tiny_encoder)})
    student = build_student(parts, Geometry.SQUASH)
    save_student(student, folder / "student" / "model")
    tiny.write_rows(folder / "rows", images=5, text_rows=0)
    write_rows(folder / "rows" / "images", folder / "prompts.json")
    recipe = json.dumps(
        {
            "extends": "_parts/_probe",
            "name": "teachers",
            "output": "unused",
            "start_from": "unused",
            "data": {"sources": [{"json": "a", "images": "b"}]},
            "distillation": {
                "tasks": {
                    task: {"target": {"kind": kind, "model": str(place), "size": size}, "layers": [1]}
                    for task, (kind, size, place) in places.items()
                }
            },
        }
    )
    (folder / "teachers.yaml").write_text(recipe)
    targets = teacher_targets_of(load_run(folder / "teachers.yaml"), ["depth", "seg"], "the test's recipe")
    changes = ["optimization.max_steps=2", "optimization.global_batch=4", "optimization.micro_batch=4"]
    run = probe_run(
        folder / "student",
        folder / "out",
        targets,
        folder / "prompts.json",
        folder / "rows" / "images",
        [*changes, "optimization.precision=float32", "data.workers=0"],
    )
    run_stage(run)
    return folder


def test_a_probe_has_a_head_for_each_layer_and_leaves_the_model_as_it_is(probed):
    before = load_file(probed / "student" / "model" / "model.safetensors")
    after = load_file(probed / "out" / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    found = load_pre_trained(probed / "out")
    layers = found.model.config.get_text_config().num_hidden_layers
    wanted = [f"{task}_{layer}" for task in ("depth", "seg") for layer in range(1, layers + 1)]
    assert list(found.model.objective.predictors) == wanted
    assert found.teachers["depth"].read == "last"


def test_cosines_stand_beside_their_controls(probed):
    found = cosine_findings(load_pre_trained(probed / "out"), sorted((probed / "rows" / "images").glob("*")))
    assert {f.measure for f in found} == {"centered cosine", "cosine"}
    assert all(-1 <= value <= 1 for f in found for value in (f.value, *f.controls.values()))
    # Untrained heads give nearly the same for every image: another image's prediction is as good.
    assert all(abs(f.value - f.controls["other image's prediction"]) < 0.2 for f in found if "centered" in f.measure)


def test_da2k_counts_the_pairs_whose_order_the_decoded_depth_has(probed, tmp_path):
    folder = tmp_path / "eval" / "DA-2K"
    (folder / "images").mkdir(parents=True)
    marks = {}
    for number in range(3):
        name = f"images/{number}.png"
        Image.fromarray(np.random.default_rng(number).integers(0, 255, (20, 40, 3), dtype=np.uint8)).save(folder / name)
        marks[name] = [{"point1": [2, 3], "point2": [18, 30], "closer_point": "point1"}]
    (folder / "annotations.json").write_text(json.dumps(marks))
    found = load_pre_trained(probed / "out")
    for finding in da2k_findings(found, tmp_path):
        assert finding.name.startswith("depth/") and finding.value in (0, 1 / 3, 2 / 3, 1)
        assert {"ties to the second point", "mean target", "teacher"} < set(finding.controls)
        assert finding.interval == pytest.approx(wilson(3 * finding.value, 3))  # also has a width if all are right
    with pytest.raises(ConfigError, match="visper data prepare da-2k --root"):
        da2k_findings(found, tmp_path / "elsewhere")


def test_coco_compares_the_segments_with_the_panoptic_map(probed, tmp_path):
    folder = tmp_path / "coco"
    for place in ("annotations", "val2017", "panoptic_val2017"):
        (folder / place).mkdir(parents=True)
    rows = []
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "val2017" / f"{number:012}.jpg")
        Image.fromarray(np.full((32, 32, 3), (9, 0, 0), np.uint8)).save(
            folder / "panoptic_val2017" / f"{number:012}.png"
        )
        rows.append({"file_name": f"{number:012}.png", "segments_info": [{"id": 9, "category_id": 44}]})
    table = {"annotations": rows, "categories": [{"id": 1, "name": "a"}, {"id": 44, "name": "b"}]}
    (folder / "annotations" / "panoptic_val2017.json").write_text(json.dumps(table))
    for finding in coco_findings(load_pre_trained(probed / "out"), tmp_path):
        assert finding.name.startswith("seg/") and 0 <= finding.value <= 1
        assert set(finding.controls) == {"other image's prediction", "mean target", "teacher"}


def test_a_score_without_ties_can_beat_its_controls():
    finding = Finding("depth/1", "DA-2K", 0.8, {TIES_WRONG: 0.8, TEACHER: 0.9, OTHER: 0.5})
    assert finding.beats_controls and not replace(finding, value=0.4).beats_controls


@pytest.mark.parametrize("turned", [False, True])
def test_the_nearer_point_is_the_brighter_one_and_ties_go_to_the_first(probed, tmp_path, monkeypatch, turned):
    folder = tmp_path / "eval" / "DA-2K"
    folder.mkdir(parents=True)
    turn = Image.Exif()
    turn[ExifTags.Base.Orientation] = 6  # the points are those of the upright image
    Image.new("RGB", (20, 40) if turned else (40, 20)).save(folder / "a.png", **({"exif": turn} if turned else {}))
    left, right, right_below = [2, 25], [2, 36], [18, 36]  # [y, x]
    marks = [
        {"point1": right, "point2": left, "closer_point": "point1"},  # right
        {"point1": left, "point2": right_below, "closer_point": "point2"},  # right
        {"point1": left, "point2": right, "closer_point": "point2"},  # right
        {"point1": left, "point2": right, "closer_point": "point1"},  # wrong
        {"point1": right, "point2": right_below, "closer_point": "point1"},  # a tie, right
    ]
    (folder / "annotations.json").write_text(json.dumps({"a.png": marks}))
    found = load_pre_trained(probed / "out")
    near_at_the_right = torch.linspace(0, 1, 56).expand(1, 3, 56, 56)
    monkeypatch.setattr(found.teachers["depth"], "decode", lambda values: near_at_the_right)
    for finding in da2k_findings(found, tmp_path):
        assert (finding.value, finding.controls["teacher"]) == (0.8, 0.8)
        assert finding.controls["ties to the second point"] == 0.6
        assert finding.interval == wilson(0.8, 1)  # nothing says how alike the pairs of one image are


def test_categories_are_classes_in_their_order(probed, tmp_path, monkeypatch):
    folder = tmp_path / "coco"
    for place in ("annotations", "val2017", "panoptic_val2017"):
        (folder / place).mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(folder / "val2017" / "1.jpg")
    ids = np.zeros((4, 4, 3), np.uint8)
    ids[:2], ids[2] = (7, 0, 0), (9, 0, 0)  # two rows of one segment, one of another, one without a label
    Image.fromarray(ids).save(folder / "panoptic_val2017" / "1.png")
    segments = [{"id": 7, "category_id": 200}, {"id": 9, "category_id": 1}]
    table = {"annotations": [{"file_name": "1.png", "segments_info": segments}]}
    table["categories"] = [{"id": number, "name": ""} for number in (1, 90, 200)]
    (folder / "annotations" / "panoptic_val2017.json").write_text(json.dumps(table))
    found = load_pre_trained(probed / "out")
    seen = torch.full((4, 4), 2 + 1)  # class 2, which is category 200, everywhere; Segmentation counts from 1
    monkeypatch.setattr(found.teachers["seg"], "segment", lambda *_: [Segmentation(seen, {}, {})])
    for finding in coco_findings(found, tmp_path):
        assert finding.value == pytest.approx((2 / 3 + 0) / 2)  # class 2: 2 of 3 rows; class 0: none of 1


def test_findings_are_read_back_and_drawn(tmp_path):
    found = [
        Finding(f"depth/{layer}", "DA-2K", 0.5 + layer / 10, {"teacher": 0.97}, interval=(0.4, 0.9)) for layer in (1, 2)
    ]
    save_findings(found, tmp_path / "probe.json")
    assert read_findings(tmp_path) == found
    draw_curves({"one": found, "two": found}, tmp_path / "curves.svg")
    shown = (tmp_path / "curves.svg").read_text()
    assert "<!-- dotted: controls, shaded: 95 % interval over images -->" in shown
    with pytest.raises(ConfigError, match=r"curves\.what"):
        draw_curves({"one": found}, tmp_path / "curves.what")
    with pytest.raises(ConfigError, match="no scores of a probe"):
        read_findings(tmp_path / "elsewhere")


def test_tasks_without_a_teacher_are_refused():
    with pytest.raises(ConfigError, match=r"quickstart/pt has no teacher for \['edges'\].*depth"):
        teacher_targets_of(load_run("quickstart/pt"), ["edges"], "quickstart/pt")
