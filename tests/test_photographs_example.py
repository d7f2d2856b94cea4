"""The comparison on photographs: arms differ in their losses alone, the control has other images' targets."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch

from visper.config import load_run
from visper.distillation.teachers.base import TargetSpec
from visper.target_store.fingerprint import Fingerprint
from visper.target_store.quantize import TargetCodec
from visper.target_store.store import StoredTeacher, TaskTargets, claim_store, folder_of, write_part

pytest.importorskip("onnx")

FOLDER = Path(__file__).parents[1] / "examples" / "photographs"
SPEC = TargetSpec(2, 3, None)


def module(name):
    """A script of the example, imported."""
    spec = importlib.util.spec_from_file_location(f"photographs_{name}", FOLDER / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def compare():
    return module("compare")


@pytest.fixture(scope="module")
def prepare():
    return module("prepare")


def test_arms_of_a_stage_differ_in_their_losses_alone(compare):
    assert {arm for group in compare.ORDER for arm in group} == {file.stem for file in FOLDER.glob("*.yaml")}
    for arm in (arm for group in compare.ORDER for arm in group):
        own, baseline = (
            load_run(FOLDER / f"{name}.yaml").model_dump(exclude={"name", "output", "distillation"})
            for name in (arm, compare.baseline_of(arm))
        )
        if arm == "pt-longer":
            assert own["optimization"].pop("max_steps") > baseline["optimization"].pop("max_steps")
        assert own == baseline
    tasks = [load_run(FOLDER / f"pt-{arm}.yaml").distillation.tasks for arm in ("published", "shuffled")]
    assert tasks[0] == tasks[1]


def test_shuffled_images_have_the_target_of_another_and_the_others_their_own(prepare, tmp_path):
    images = [bytes([number]) * 16 for number in range(1, 9)]
    codec = TargetCodec(SPEC, "float16")
    claim_store(tmp_path / "store", "float16")
    folders = []
    for kind in ("one", "two"):
        teacher = StoredTeacher(Fingerprint(kind, None, {}, "squash", None), SPEC, "float32", "model", {})
        folders.append(folder_of(tmp_path / "store", teacher.fingerprint))
        teacher.write(folders[-1])
        values = torch.arange(8.0)[:, None, None].expand(8, 2, 3)
        write_part(folders[-1], codec, images, list(codec.pack(values)), "part")
    prepare.shuffle_targets(tmp_path / "store", tmp_path / "out", images[:6], images[6:])
    found = []
    for folder in folders:
        targets = TaskTargets(tmp_path / "out" / folder.name, "float16")
        found.append([int(codec.decode(targets.read(image)[None]).mean()) for image in images])
    assert found[0] == found[1]
    assert found[0][6:] == [6, 7]
    assert sorted(found[0][:6]) == list(range(6)) and all(own != at for at, own in enumerate(found[0][:6]))


def test_a_store_that_lacks_an_image_is_not_shuffled(prepare, tmp_path):
    with pytest.raises(SystemExit, match="no target store"):
        prepare.shuffle_targets(tmp_path / "none", tmp_path / "out", [b"a" * 16, b"b" * 16], [])


def test_runs_that_began_or_went_on_otherwise_are_not_compared(compare):
    first = {"arm": "pt-nothing", "seed": 0, "projector": "a", "order": "b"}
    compare.require_alike([first, {**first, "arm": "pt-published"}, {**first, "seed": 1, "projector": "c"}])
    for what in ("projector", "order"):
        with pytest.raises(ValueError, match=f"pt-published and pt-nothing differ in {what}"):
            compare.require_alike([first, {**first, "arm": "pt-published", what: "other"}])


def test_a_difference_is_paired_by_seed_with_its_t_interval(compare):
    mean, low, high = compare.difference({0: 2.0, 1: 3.0, 2: 4.5}, {0: 1.0, 1: 1.0, 2: 1.5, 3: 9.0})
    # Differences 1, 2, 3; seed 3 has no pair. Student's t at 97.5 % with 2 degrees of freedom is 4.3027.
    half = 4.3027 / math.sqrt(3)
    assert (mean, low, high) == pytest.approx((2.0, 2.0 - half, 2.0 + half), rel=1e-3)
    assert compare.difference({0: 1.0}, {0: 0.5}) == (0.5, -math.inf, math.inf)


def test_the_table_compares_what_both_arms_measured_and_finishes_with_some_runs_missing(compare):
    shared = {"projector": "a", "order": "b", "cpu_seconds": 1.0, "trained": {"steps": 2}}
    losses = {"pt-nothing": {"ntp": 3.0}, "pt-published": {"ntp": 2.0, "seg/1/cosine": 0.5}}
    losses["pt-shuffled"] = {"ntp": 2.5, "seg/1/cosine": 0.75}
    runs = [
        {**shared, "arm": arm, "seed": seed, "held_out": {name: value * (1 + seed) for name, value in held_out.items()}}
        for arm, held_out in losses.items()
        for seed in (0, 1)
    ]
    shown = compare.table(runs)
    assert "| pt-published | 2 | 1 | 2.000, 4.000 | 3.000 | -1.500 (" in shown
    assert "| seg/1/cosine | -0.375 (" in shown and "ift" not in shown
    assert "| pt-nothing | 2 | 1 | 3.000 | 3.000 |  |" in compare.table(runs[:1])


def test_the_edge_teacher_sees_an_edge_by_its_direction(prepare, tmp_path):
    pytest.importorskip("onnxruntime")
    import onnx

    from visper.distillation.teachers.onnx import OnnxTeacher

    onnx.save(prepare.edge_network(), tmp_path / "edges.onnx")
    teacher = OnnxTeacher(tmp_path / "edges.onnx", size=16, grid=2, threads=1)
    image = torch.zeros(1, 3, 16, 16)
    image[..., 8:] = 1.0
    upright, level, *_ = teacher.encode(image)[0, :, :].mean(0).tolist()
    # |Sobel| of a step of height 1 is 4 in two columns of 16, times 4; the padding adds edges at the border.
    assert upright > level > 0
    flat = teacher.encode(torch.zeros(1, 3, 16, 16))
    assert torch.equal(flat, torch.zeros_like(flat))
