"""``visper probe``: refusals come before training, a probe is trained as a run, finished probes stay what they are."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from typer.testing import CliRunner

from tests import tiny
from tests.evaluation.probe.test_measures import probed  # noqa: F401 - a fixture
from tests.vlms import save_vlm
from visper.cli import app
from visper.common.console import Console
from visper.common.errors import ConfigError
from visper.common.lock import InUseError, locked
from visper.config import load_run
from visper.evaluation.probe.curves import SCORES, add_findings, draw_curves, named_apart, read_findings, titles
from visper.evaluation.probe.measures import Finding, da2k_files
from visper.evaluation.probe.recipe import images_below, probe_run, rows_file, teacher_targets_of, write_rows
from visper.training import run_stage

SMALL = ["optimization.global_batch=4", "optimization.precision=float32", "data.workers=0"]


def probe(folder, out, *options):
    """Runs the command on the fixture's student for one step."""
    command = ["probe", folder / "student", "--teachers", folder / "teachers.yaml", "-o", out, "--task", "depth"]
    command += ["--images", folder / "rows" / "images", *options]
    for change in (*SMALL, "optimization.max_steps=1", "optimization.micro_batch=4"):
        command += ["--set", change]
    result = CliRunner().invoke(app, [str(part) for part in command])
    if result.exception is not None:
        raise result.exception
    return result


def trained(folder, out, micro_batch, callbacks=()):
    """The heads after four steps; with ``callbacks`` that stop it, after as many as they let it take."""
    targets = teacher_targets_of(load_run(folder / "teachers.yaml"), ["depth", "seg"], "the test's recipe")
    changes = [*SMALL, "optimization.max_steps=4", f"optimization.micro_batch={micro_batch}"]
    images = folder / "rows" / "images"
    run_stage(
        probe_run(folder / "student", out, targets, folder / "prompts.json", images, changes),
        resume=True,
        callbacks=callbacks,
    )
    return load_file(out / "distillation" / "weights.safetensors")


class StopAfterTwo(TrainerCallback):
    """Saves and ends training at step 2."""

    def on_step_end(self, args, state, control, **_):
        control.should_save = control.should_training_stop = state.global_step == 2


@pytest.mark.slow
def test_a_probe_resumes_bit_for_bit_and_does_not_depend_on_the_split(probed, tmp_path):  # noqa: F811
    straight = trained(probed, tmp_path / "straight", 4)
    trained(probed, tmp_path / "stopped", 4, [StopAfterTwo()])
    for folder in ("model", "distillation"):  # as if it had been killed at its checkpoint
        shutil.rmtree(tmp_path / "stopped" / folder)
    resumed = trained(probed, tmp_path / "stopped", 4)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    split = trained(probed, tmp_path / "split", 1)
    torch.testing.assert_close(split, straight, atol=1e-6, rtol=0)  # float32 sums in another order: 1.2e-7 measured


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--score", "da-2k", "--root", "nowhere"], "visper data prepare da-2k --root nowhere"),
        (["--score", "da2k"], "--score da2k: expected da-2k"),
        (["--beside", "nowhere", "--score", "{held_out}"], "no scores of a probe at .*nowhere"),
        (["--plot", "curves.doc", "--score", "{held_out}"], r"curves\.doc'"),
        (["--plot", "curves.png"], r"out' has no scores to draw: add --score"),
        (["--beside", "{scored}"], r"out' has no scores to draw: add --score"),
    ],
)
def test_what_could_not_be_scored_is_refused_before_training(probed, tmp_path, options, message):  # noqa: F811
    places = {"held_out": tiny.write_rows(tmp_path / "held-out") / "images", "scored": tmp_path / "scored"}
    places["scored"].mkdir()
    add_findings([], places["scored"] / SCORES)
    with pytest.raises(ConfigError, match=message):
        probe(probed, tmp_path / "out", *(option.format(**places) for option in options))
    assert not (tmp_path / "out").exists()


def test_a_set_whose_teacher_is_not_probed_is_refused_before_training(probed, tmp_path):  # noqa: F811
    for place in ("annotations/panoptic_val2017.json", "panoptic_val2017", "val2017"):
        (tmp_path / "coco" / place).mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"needs a teacher of kind 'oneformer', but the probe's tasks have"):
        probe(probed, tmp_path / "out", "--score", "coco-panoptic-val2017", "--root", tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_finished_probe_keeps_its_images_and_adds_scores(probed, tmp_path):  # noqa: F811
    images, out = tiny.write_rows(tmp_path / "scored", images=4, seed=7) / "images", tmp_path / "out"
    probe(probed, out, "--score", images, "--score-limit", 3)
    first = read_findings(out)
    with pytest.raises(ConfigError, match=r"trained on the images in .* but these are others \(4\)"):
        probe(probed, out, "--limit", 4)
    assert len(json.loads((tmp_path / "out.probe-rows.json").read_text())) == 5
    shutil.copytree(images, tmp_path / "held-out")
    probe(probed, out, "--score", tmp_path / "held-out")
    both = read_findings(out)
    shutil.copytree(out, tmp_path / "other")
    probe(probed, out, "--beside", tmp_path / "other", "--plot", tmp_path / "both.png")
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    assert both[: len(first)] == first and {f.kind[1:] for f in both[len(first) :]} == {
        (measure, str(tmp_path / "held-out"), 4) for measure in ("centered cosine", "cosine")
    }
    probe(probed, out, "--score", tmp_path / "held-out", "--score-limit", 2)
    assert read_findings(out)[: len(both)] == both


def test_two_commands_for_one_probe_do_not_exchange_their_images(probed, tmp_path):  # noqa: F811
    out = tmp_path / "probe"
    with locked(tmp_path / ".probe.lock", Console(quiet=True)), pytest.raises(InUseError, match="is in use by process"):
        probe(probed, out, "--limit", "2")
    assert not rows_file(out).exists()


def test_a_probe_needs_a_folder_of_its_own(probed, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"output '.' exists, is not empty .*: choose another output"):
        probe(probed, Path(), "--limit", "2")


def test_a_part_of_the_images_is_spread_over_all_of_them(tmp_path):
    """Sorted by name, images are often sorted by content: DA-2K by kind of scene, other sets by class."""
    names = [f"{kind}/{number}.png" for kind in ("aerial", "indoor", "water") for number in range(4)]
    for name in names:
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).touch()
    write_rows(tmp_path / "images", tmp_path / "rows.json", limit=3)
    assert [row["image"] for row in json.loads((tmp_path / "rows.json").read_text())] == names[::4]
    (tmp_path / "eval" / "DA-2K").mkdir(parents=True)
    (tmp_path / "eval" / "DA-2K" / "annotations.json").write_text(json.dumps(dict.fromkeys(names, ())))
    assert da2k_files(tmp_path, 3) == [tmp_path / "eval" / "DA-2K" / name for name in names[::4]]


def test_images_are_the_files_that_rows_may_name(tmp_path):
    for name in ("a.tif", "b.AVIF", "c.jpeg", "d.txt"):
        (tmp_path / name).touch()
    assert [file.name for file in images_below(tmp_path)] == ["a.tif", "b.AVIF", "c.jpeg"]
    (tmp_path / "none").mkdir()
    with pytest.raises(ConfigError, match=r"none' has no images \(\.jpg, .*give a folder with images"):
        images_below(tmp_path / "none")


def test_images_that_are_trained_on_are_not_scored(probed, tmp_path):  # noqa: F811
    """Neither under their own names, nor as copies under others."""
    images, copies = probed / "rows" / "images", tmp_path / "held-out"
    with pytest.raises(ConfigError, match=rf"trained on 5 of its 5 images, such as '{images}/0.png'"):
        probe(probed, tmp_path / "out", "--score", images)
    tiny.write_rows(tmp_path / "scored", images=4, seed=7)
    shutil.move(tmp_path / "scored" / "images", copies)
    shutil.copy(images / "2.png", copies / "z.png")
    with pytest.raises(ConfigError, match=rf"trained on 1 of its 5 images, such as '{copies}/z.png' \('.*2.png'\)"):
        probe(probed, tmp_path / "out", "--score", copies)
    assert not (tmp_path / "out").exists()
    probe(probed, tmp_path / "out", "--score", copies, "--score-limit", 4)


def test_a_probe_of_a_model_that_was_trained_again_is_refused(probed, tmp_path):  # noqa: F811
    shutil.copytree(probed / "student", tmp_path / "student")
    for name in ("teachers.yaml", "rows"):
        (tmp_path / name).symlink_to(probed / name)
    probe(tmp_path, tmp_path / "out")
    file = tmp_path / "student" / "model" / "model.safetensors"
    save_file({name: value + 1 for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(
        ConfigError, match=r"finished, but changed since it began: start_from '.*student/model'\. Remove"
    ):
        probe(tmp_path, tmp_path / "out")


def test_an_image_text_to_text_model_is_probed_too(probed, tmp_path):  # noqa: F811
    (tmp_path / "student").symlink_to(save_vlm(tmp_path / "smolvlm", "smolvlm"))
    for name in ("teachers.yaml", "rows"):
        (tmp_path / name).symlink_to(probed / name)
    scored = tiny.write_rows(tmp_path / "scored", images=4, seed=7) / "images"
    probe(tmp_path, tmp_path / "out", "--score", scored)
    assert {f.name for f in read_findings(tmp_path / "out")} == {"depth/1", "depth/2", "depth/3"}


def test_a_probe_of_a_probe_is_refused(probed, tmp_path):  # noqa: F811
    targets = teacher_targets_of(load_run(probed / "teachers.yaml"), ["depth"], "the test's recipe")
    with pytest.raises(ConfigError, match=r"is itself a probe: give the model that it probed, '.*student"):
        probe_run(probed / "out", tmp_path / "out", targets, probed / "prompts.json", probed / "rows" / "images")
    # Its run says so, not the position of its heads: any run may read the whole sequence.
    shutil.copytree(probed / "out" / "model", tmp_path / "trained" / "model")
    file = tmp_path / "trained" / "model" / "run.yaml"
    file.write_text(re.sub(r"- llm\n", "- vision\n", file.read_text()))
    run = probe_run(tmp_path / "trained", tmp_path / "out", targets, probed / "prompts.json", probed / "rows")
    assert run.start_from == str(tmp_path / "trained" / "model")


def test_probes_in_folders_of_one_name_are_told_apart(tmp_path):
    places = [tmp_path / "base" / "probe", tmp_path / "pt" / "probe"]
    assert list(named_apart(places)) == ["base/probe", "pt/probe"]
    assert list(named_apart([tmp_path / "a", tmp_path / "b"])) == ["a", "b"]
    with pytest.raises(ConfigError, match="named twice"):
        named_apart([tmp_path / "a", tmp_path / "a"])


@pytest.mark.parametrize("content", ["", "[{", '{"a": 1}', "[1]", '[{"measure": "other"}]'])
def test_a_file_without_scores_is_named(tmp_path, content):
    (tmp_path / "probe.json").write_text(content)
    with pytest.raises(ConfigError, match=r"probe\.json' is cut short or holds no scores of a probe"):
        read_findings(tmp_path)


def test_a_measure_taken_again_replaces_its_value(tmp_path):
    add_findings([Finding("depth/1", "DA-2K", 0.5, {}), Finding("depth/1", "cosine", 0.1, {})], tmp_path / "probe.json")
    add_findings([Finding("depth/1", "DA-2K", 0.7, {})], tmp_path / "probe.json")
    assert [(f.measure, f.value) for f in read_findings(tmp_path)] == [("DA-2K", 0.7), ("cosine", 0.1)]


def test_folders_of_one_name_and_other_numbers_of_images_are_kept_apart(tmp_path):
    kinds = [("coco/val", 5000), ("places/val", 5000), ("coco/val", 100)]
    found = [Finding("depth/1", "cosine", 0.1 * n, {}, of=of, images=images) for n, (of, images) in enumerate(kinds)]
    for finding in found:
        add_findings([finding], tmp_path / "probe.json")
    assert read_findings(tmp_path) == found
    shown = ["cosine, coco/val (5000 images)", "cosine, places/val (5000 images)", "cosine, coco/val (100 images)"]
    assert list(titles(found).values()) == shown
    draw_curves({"a": found[:1], "b": found[2:]}, tmp_path / "curves.svg")
    svg = (tmp_path / "curves.svg").read_text()
    assert "cosine, val (5000 images)" in svg and "cosine, val (100 images)" in svg


def test_models_with_different_measures_share_a_drawing(tmp_path):
    found = {"a": [Finding("depth/1", "DA-2K", 0.5, {})], "b": [Finding("seg/1", "mIoU", 0.5, {})]}
    draw_curves(found, tmp_path / "curves.svg")
    assert (tmp_path / "curves.svg").stat().st_size
