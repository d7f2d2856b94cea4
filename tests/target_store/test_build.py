"""A target store: what it makes of a run, and that training cannot tell it from the teachers."""

import errno
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import visper.quickstart
from tests import tiny, tiny_teachers
from tests.data.sets.killed import in_fork
from tests.logs import computed
from visper.cli import app
from visper.common.console import Console
from visper.common.errors import ConfigError, DataError
from visper.common.lock import locked
from visper.config import Run, save_run
from visper.data.rows.parquet import write_parquet
from visper.data.rows.records import DropList
from visper.data.rows.sources import open_records
from visper.target_store import plan as planning
from visper.target_store.build import build_targets
from visper.target_store.store import TEACHER, StoredTeacher
from visper.training import run_stage
from visper.training.trainer import StageTrainer


@pytest.fixture
def rows(tmp_path):
    folder = tiny.write_rows(tmp_path / "rows", images=7, text_rows=2)
    shutil.copy(folder / "images" / "1.png", folder / "images" / "6.png")  # one content twice
    return folder


@pytest.fixture
def make(tiny_llm, tiny_encoder, rows, tmp_path, monkeypatch):
    """``make("live", targets=STORE, geometry="pad", teacher={...})``: a PT run of three steps."""
    monkeypatch.setenv("VISPER_CACHE", str(tmp_path / "cache"))

    def build(name, targets=None, geometry="squash", teacher=None, teachers=None, workers=0, source=None, **data):
        distillation = tiny.distillation(targets=None if targets is None else str(targets))
        for task in distillation["tasks"].values():
            task["target"] = {**task["target"], "kind": "tests.tiny:HalfColors", **(teacher or {})}
        for task, own in (teachers or {}).items():
            distillation["tasks"][task]["target"] = own
        source = source or {"json": str(rows / "rows.json"), "images": str(rows / "images")}
        settings = {
            "name": name,
            "stage": "pt",
            "output": str(tmp_path / name),
            "student": {"llm": str(tiny_llm), "encoder": str(tiny_encoder)},
            "data": {"sources": [source], "workers": workers, "geometry": geometry, "drop_limit": 0.5, **data},
            "distillation": distillation,
            "optimization": {"global_batch": 4, "micro_batch": 2, "lr": 1e-3, "max_steps": 3, "precision": "float32"},
            "logging": {"every": 1},
        }
        return Run.model_validate(settings)

    return build


def train(run):
    run_stage(run)
    return computed(run.output), load_file(Path(run.output) / "model" / "model.safetensors")


def files_of(store):
    found = {file.relative_to(store).as_posix(): file for file in store.rglob("*") if file.is_file()}
    return {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in found.items()}


@pytest.mark.parametrize(("dtype", "geometry"), [("float16", "squash"), ("float32", "pad")])
def test_training_cannot_tell_stored_targets_from_teachers(make, tmp_path, monkeypatch, dtype, geometry):
    live_logs, live = train(make("live", geometry=geometry))
    build_targets(make("build", geometry=geometry), tmp_path / "store", dtype, batch=3, quiet=True)
    monkeypatch.setattr("visper.training.run.build_teachers", None)  # no teacher is loaded
    stored_logs, stored = train(make("stored", tmp_path / "store", geometry))
    assert stored_logs == live_logs and live_logs[0]["depth/1/smooth_l1"] > 0
    assert stored.keys() == live.keys() and all(torch.equal(stored[name], live[name]) for name in live)


def of_transformers(folder):
    depth = tiny_teachers.save(tiny_teachers.depth_model(), folder / "depth")
    seg, gen = tiny_teachers.save_oneformer(folder / "seg"), tiny_teachers.save_unclip(folder / "gen")
    return {
        "depth": {"kind": "depth_anything", "model": str(depth), "size": 56},
        "seg": {"kind": "oneformer", "model": str(seg), "size": 128},
        "gen": {"kind": "unclip", "model": str(gen), "subfolder": "image_encoder"},
    }


TOWER = "visper.quickstart.tower:TowerTeacher"


def towers_and_onnx(folder):
    save_onnx = pytest.importorskip("tests.distillation.test_onnx").save
    bases = Path(visper.quickstart.__file__).parent / "bases"
    return {
        "depth": {"kind": TOWER, "model": str(bases / "teacher_depth")},
        "seg": {"kind": "onnx", "model": str(save_onnx(folder / "m.onnx")), "grid": 4},
        "gen": {"kind": TOWER, "model": str(bases / "teacher_gen")},
    }


@pytest.mark.parametrize("kinds", [of_transformers, towers_and_onnx])
def test_every_kind_of_teacher_can_be_stored(make, tmp_path, kinds):
    teachers = kinds(tmp_path)
    build_targets(make("build", teachers=teachers), tmp_path / "store", "float32", quiet=True)
    (live, *_), _ = train(make("live", teachers=teachers))
    (stored, *_), _ = train(make("stored", tmp_path / "store", teachers=teachers))
    for name, value in live.items():
        # Teachers saw the images in batches of another size: 1e-7 measured.
        assert stored[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize(("dtype", "relative"), [("int8", 0.01), ("fp8", 0.04)])
def test_eight_bits_move_the_losses_by_little(make, tmp_path, dtype, relative):
    (first, *_), _ = train(make("live"))
    build_targets(make("build"), tmp_path / "store", dtype, quiet=True)
    (stored, *_), _ = train(make("stored", tmp_path / "store"))
    terms = [name for name in first if name.count("/") == 2]
    assert terms and all(stored[name] == pytest.approx(first[name], rel=relative) for name in terms)


def test_every_image_of_a_row_gets_its_target(make, tmp_path):
    rows = tiny.write_several(tmp_path / "several")
    source = {"json": str(rows / "rows.json"), "images": str(rows / "images")}
    plan = build_targets(make("build", source=source), tmp_path / "store", "float32", batch=3, quiet=True)
    assert plan.images == 6 and not build_targets(make("again", source=source), tmp_path / "store", quiet=True).parts
    live_logs, live = train(make("live", source=source))
    stored_logs, stored = train(make("stored", tmp_path / "store", source=source))
    assert stored_logs == live_logs and all(torch.equal(stored[name], live[name]) for name in live)
    (rows / "images" / "7.png").write_bytes((rows / "images" / "0.png").read_bytes()[:-1])
    with pytest.raises(DataError, match=r"1 images of task .depth.*the first is .*7\.png"):
        run_stage(make("changed", tmp_path / "store", source=source))


def test_images_are_computed_once_by_content_and_text_rows_not_at_all(make, tmp_path):
    plan = build_targets(make("build"), tmp_path / "store", quiet=True)
    assert plan.images == 6 and plan.sizes == {"depth": 6 * 256, "seg": 6 * 192, "gen": 6 * 20}
    assert not build_targets(make("build"), tmp_path / "store", quiet=True).parts, "nothing to do"
    assert len({file.stat().st_mode for file in (tmp_path / "store").glob("*/*")}) == 1, "parts are shared as all else"


def test_size_and_check_say_what_a_build_would_do(make, tmp_path):
    run = make("build")
    save_run(run, tmp_path / "run.yaml")
    arguments = [str(tmp_path / "run.yaml"), "--out", str(tmp_path / "store")]
    sized = CliRunner().invoke(app, ["targets", "build", *arguments, "--size", "--dtype", "int8"])
    assert "6 of 6 images to compute; 16 x 8 int8, 160 bytes per image: 960 bytes" in sized.output
    assert "free at" in sized.output and not (tmp_path / "store").exists()
    assert CliRunner().invoke(app, ["targets", "build", *arguments]).exit_code == 0
    checked = CliRunner().invoke(app, ["targets", "check", *arguments])
    assert checked.exit_code == 0 and "complete: 6 images, all checksums match" in checked.output
    other = CliRunner().invoke(app, ["targets", "check", *arguments, "data.geometry=crop"])
    assert isinstance(other.exception, ConfigError)


def test_the_command_that_a_refused_store_names_mends_it(make, tmp_path):
    save_run(make("build"), tmp_path / "run.yaml")
    recipe, store = str(tmp_path / "run.yaml"), str(tmp_path / "a store")
    build_targets(make("build"), Path(store), quiet=True)
    for quick in ([], ["--quick"]):
        refused = CliRunner().invoke(app, ["targets", "check", recipe, "data.geometry=crop", "--out", store, *quick])
        command = shlex.split(re.search("To add them: `(.*)`", str(refused.exception))[1])
        assert command == ["visper", "targets", "build", recipe, "data.geometry=crop", "--out", store]
    assert CliRunner().invoke(app, command[1:]).exit_code == 0
    assert CliRunner().invoke(app, ["targets", "check", recipe, "data.geometry=crop", "--out", store]).exit_code == 0


def test_a_disk_that_is_too_small_is_refused_before_anything_is_computed(make, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "_free_bytes", lambda out: 1000)
    with pytest.raises(ConfigError, match=r"take 2\.84 kB, but '.*' has 1\.00 kB free: .*--dtype int8"):
        build_targets(make("build"), tmp_path / "store", quiet=True)
    assert not [part for part in (tmp_path / "store").iterdir() if part.is_dir()]
    monkeypatch.undo()
    build_targets(make("build"), tmp_path / "store", "int8", quiet=True)  # as the message advises


def test_a_build_that_failed_before_its_first_target_fixes_no_precision(make, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "full")

    run = make("build")
    with monkeypatch.context() as patched, pytest.raises(OSError, match="full"):
        patched.setattr("visper.target_store.build.write_part", full)
        build_targets(run, tmp_path / "store", quiet=True)
    half = run.distillation.model_copy(update={"teacher_dtype": "bfloat16"})
    build_targets(run.model_copy(update={"distillation": half}), tmp_path / "store", quiet=True)
    assert {StoredTeacher.read(file.parent).precision for file in tmp_path.glob(f"store/*/{TEACHER}")} == {"bfloat16"}


def test_missing_images_are_no_complete_store(make, rows, tmp_path):
    """The store does not hold all images if the disk with the images was not mounted."""
    (rows / "images").rename(rows / "elsewhere")
    message = r"7 of 9 rows \(77\.8%\), allowed 50\.0%: missing image 7; .*images/0\.png'"
    for size_only in (True, False):
        with pytest.raises(DataError, match=message):
            build_targets(make("build"), tmp_path / "store", size_only=size_only, quiet=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"geometry": "pad"}, r"geometry 'squash' instead of 'pad'; background None instead of \[\d+, "),
        ({"teacher": {"size": 20}}, r"options \{.*\} instead of \{.*'size': 20"),
        ({"teacher": {"model": "others"}}, r"revision 'name:colors' instead of 'name:others'"),
        ({"teacher": {"kind": "tests.tiny:PooledColors"}}, "but targets of .*HalfColors.* teachers"),
    ],
)
def test_a_store_of_other_teachers_is_refused_with_what_differs(make, tmp_path, changes, message):
    build_targets(make("build"), tmp_path / "store", quiet=True)
    with pytest.raises(ConfigError, match="has no targets of the teacher .*" + message + ".*`visper targets build "):
        run_stage(make("other", tmp_path / "store", **changes))


def test_other_dtypes_precisions_and_folders_are_refused(make, tmp_path, rows):
    build_targets(make("build"), tmp_path / "store", "float16", quiet=True)
    with pytest.raises(ConfigError, match="in float16, not int8"):
        build_targets(make("build"), tmp_path / "store", "int8", quiet=True)
    run = make("precise", tmp_path / "store")
    distillation = run.distillation.model_copy(update={"teacher_dtype": "bfloat16"})
    with pytest.raises(ConfigError, match=r"computed in float32, but distillation\.teacher_dtype is bfloat16"):
        run_stage(run.model_copy(update={"distillation": distillation}))
    with pytest.raises(ConfigError, match="no target store: choose a new folder"):
        build_targets(make("build"), rows, quiet=True)
    with pytest.raises(
        ConfigError, match=r"no target store at .*`visper targets build RUN\.yaml --out .*` with the run's overrides"
    ):
        run_stage(make("nowhere", tmp_path / "nowhere"))


def test_a_changed_image_is_named_before_the_first_step_and_computed_by_a_second_build(make, tmp_path, rows):
    build_targets(make("build"), tmp_path / "store", quiet=True)
    before = files_of(tmp_path / "store")
    shutil.copy(rows / "images" / "2.png", tmp_path / "kept.png")
    shutil.copy(rows / "images" / "3.png", rows / "images" / "2.png")  # a content that is known: no miss
    (rows / "images" / "4.png").write_bytes((rows / "images" / "4.png").read_bytes() + b"\0")
    run = make("changed", tmp_path / "store")
    with pytest.raises(DataError, match=r"1 images of task 'depth', .*the first is '.*4\.png'.*`visper targets"):
        run_stage(run)
    assert build_targets(run, tmp_path / "store", quiet=True).sizes["gen"] == 20
    after = files_of(tmp_path / "store")
    assert after.items() >= before.items() and len(after) == len(before) + 3
    train(make("again", tmp_path / "store"))


def test_a_image_that_changes_while_training_is_a_dropped_row(make, tmp_path, rows, monkeypatch):
    build_targets(make("build"), tmp_path / "store", quiet=True)
    begin = StageTrainer.train

    def change_then_train(self, **kwargs):
        (rows / "images" / "4.png").write_bytes((rows / "images" / "5.png").read_bytes() + b"\0")
        return begin(self, **kwargs)

    monkeypatch.setattr(StageTrainer, "train", change_then_train)
    train(make("run", tmp_path / "store"))
    (drop,) = DropList.read(tmp_path / "run" / "dropped.jsonl")
    assert drop.reason == "no stored target" and "/4/4" in drop.sample_id and "visper targets build" in drop.detail


def test_images_that_cannot_be_decoded_are_skipped_by_build_and_by_training(make, tmp_path, rows):
    (rows / "images" / "0.png").write_bytes(b"no picture")
    plan = build_targets(make("build"), tmp_path / "store", quiet=True, batch=2)
    assert plan.images == 6 and not build_targets(make("build"), tmp_path / "store", quiet=True).parts
    logs, weights = train(make("stored", tmp_path / "store", workers=1))
    live_logs, live = train(make("live"))
    assert logs == live_logs and all(torch.equal(weights[name], live[name]) for name in live)
    assert [drop.reason for drop in DropList.read(tmp_path / "stored" / "dropped.jsonl")] == ["not an image"]


def test_parquet_files_find_the_targets_that_were_computed_from_files(make, tmp_path, rows):
    build_targets(make("build"), tmp_path / "store", quiet=True)
    records = open_records([(rows / "rows.json", rows / "images")], DropList())
    write_parquet(records, tmp_path / "parquet", DropList(), seed=1)
    embedded = make("embedded", tmp_path / "store", source={"parquet": f"{tmp_path}/parquet/*.parquet"})
    assert not build_targets(embedded, tmp_path / "store", quiet=True).parts
    assert train(embedded)[0][0]["seg/2/smooth_l1"] > 0


@pytest.mark.slow
def test_killed_anywhere_and_repeated_the_store_is_the_same(make, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "PART_BYTES", 512)  # parts of two images
    run, store, counted = make("build"), tmp_path / "store", tmp_path / "count"
    build_targets(run, tmp_path / "reference", batch=1, quiet=True)

    def build(die_at=0):
        passed = 0

        def on_event(event, arguments):
            nonlocal passed
            if (event == "open" or event.startswith("os.")) and str(store) in str(arguments[:2]):
                passed += 1
                if passed == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(on_event)
        build_targets(run, store, batch=1, quiet=True)
        counted.write_text(str(passed))

    expected = files_of(tmp_path / "reference")
    assert len(expected) == 1 + 3 + 3 * 3
    assert in_fork(build) == 0 and files_of(store) == expected
    steps = int(counted.read_text())
    for point in range(1, steps, max(1, steps // 20)):
        shutil.rmtree(store)
        assert in_fork(lambda point=point: build(point)) == signal.SIGKILL
        assert in_fork(build) == 0 and files_of(store) == expected, point


def test_one_build_at_a_time_is_in_a_store_and_leaves_no_lock(make, tmp_path):
    in_use = pytest.raises(ConfigError, match="store' is in use by process")
    with locked(tmp_path / "store", Console(quiet=True)), in_use:
        build_targets(make("build"), tmp_path / "store", quiet=True)
    build_targets(make("build"), tmp_path / "store", quiet=True)
    assert not list((tmp_path / "store").glob(".*"))


def test_a_part_that_is_broken_is_named(make, tmp_path):
    build_targets(make("build"), tmp_path / "store", quiet=True)
    part = next((tmp_path / "store").glob("*/*.safetensors"))
    part.write_bytes(part.read_bytes()[:50])
    with pytest.raises(ConfigError, match=rf"{part.name}' cannot be read: .*remove the file"):
        run_stage(make("run", tmp_path / "store"))
    part.unlink()
    assert len(build_targets(make("build"), tmp_path / "store", quiet=True).parts) == 1
    assert (part.parent / TEACHER).is_file() and part.is_file()


def test_a_part_of_another_teacher_is_refused(make, tmp_path):
    """Parts are named after their images alone, so two teachers' parts have one name, and may have one shape."""
    for name in ("colors", "other colors"):
        build_targets(make("build", teacher={"model": name}), tmp_path / name, quiet=True)
    own, other = (sorted((tmp_path / name).glob("*/*.safetensors")) for name in ("colors", "other colors"))
    there, copied = next((a, b) for a in own for b in other if a.stat().st_size == b.stat().st_size)
    assert there.name == copied.name
    shutil.copy(copied, there)
    with pytest.raises(
        ConfigError, match=f"{there.name}' has the format '.* of {copied.parent.name}', .*remove the file"
    ):
        run_stage(make("run", tmp_path / "colors"))


def test_check_names_damaged_parts_and_training_drops_their_rows(make, tmp_path):
    """One bit of one stored value flipped, in a file whose header is intact."""
    run = make("build")
    save_run(run, tmp_path / "run.yaml")
    build_targets(run, tmp_path / "store", quiet=True)
    part = next((tmp_path / "store").glob("*/*.safetensors"))
    content, offset = part.read_bytes(), _targets_offset(part)
    part.write_bytes(content[:offset] + bytes([content[offset] ^ 1]) + content[offset + 1 :])
    arguments = [str(tmp_path / "run.yaml"), "--out", str(tmp_path / "store")]
    checked = CliRunner().invoke(app, ["targets", "check", *arguments])
    assert checked.exit_code == 1 and f"damaged: {part}" in checked.output and "targets build" in checked.output
    assert CliRunner().invoke(app, ["targets", "check", *arguments, "--quick"]).exit_code == 0
    train(make("trained", tmp_path / "store"))
    (drop,) = DropList.read(tmp_path / "trained" / "dropped.jsonl")
    assert drop.reason == "damaged target" and part.name in drop.detail
    part.write_bytes(content[:100])
    assert f"damaged: {part}" in CliRunner().invoke(app, ["targets", "check", *arguments]).output


def _targets_offset(part):
    content = part.read_bytes()
    size = int.from_bytes(content[:8], "little")
    return 8 + size + json.loads(content[8 : 8 + size])["targets"]["data_offsets"][0]
