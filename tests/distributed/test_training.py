"""Two processes train what one trains: same global batch, same weights, under every engine, also where a rank meets no
image; and a run that is killed, told to stop, or loses a process goes on exactly, or ends.
"""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests import tiny
from tests.checkpoints import tensors_of
from tests.distributed.forked import train_forked
from tests.logs import computed
from visper.common.console import Console
from visper.common.lock import locked
from visper.training.checkpoint import STATE

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}"}
WAIT = 240
ZERO = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not ZERO, reason="the extra 'deepspeed' is not installed")


@pytest.fixture
def make(tiny_llm, tiny_encoder, tmp_path):
    """Writes a recipe: ``make("pt", "name", images=9, optimization={...})`` returns its file.

    ``images``: rows of one image among twelve, or the images of each row, in turn.
    """

    def build(stage, name, images=9, start=None, **changes):
        rows = tmp_path / f"rows-{images}"
        if not rows.exists() and isinstance(images, tuple):
            tiny.write_several(rows, 12, images)
        elif not rows.exists():
            tiny.write_rows(rows, images=images, text_rows=12 - images)
        settings = {
            "name": name,
            "stage": stage,
            "output": str(tmp_path / name),
            "data": {"sources": [{"json": str(rows / "rows.json"), "images": str(rows / "images")}], "workers": 0},
            "optimization": {"global_batch": 4, "micro_batch": 2, "lr": 1e-3, "precision": "float32"},
            "logging": {"every": 1, "save_every": 2},
        }
        if start is None:
            settings["student"] = {"llm": str(tiny_llm), "encoder": str(tiny_encoder)}
            if stage == "pt":
                settings["distillation"] = tiny.distillation()
        else:
            settings["start_from"] = str(start)
        for key, value in changes.items():
            settings[key] = {**settings[key], **value} if isinstance(settings.get(key), dict) else value
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(settings))
        return file

    return build


def start(recipe, *more):
    command = [sys.executable, "-m", "visper", "train", str(recipe), *more]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def train(recipe, *more):
    codes, said = train_forked(recipe, more, WAIT)
    assert not any(codes), f"exit codes {codes}\n{said[-3000:]}"
    return said


def refused(recipe, *more):
    run = start(recipe, *more)
    said, _ = run.communicate(timeout=WAIT)
    assert run.returncode != 0 and "Traceback" not in said, said[-3000:]
    return " ".join(said.split())


def cut_behind_step_2(recipe, away):
    """Leaves what a run has that was killed behind its second step."""
    away.mkdir()
    for made in ("model", "checkpoints/checkpoint-3"):
        (recipe.with_suffix("") / made).rename(away / Path(made).name)


def logs(recipe):
    return computed(recipe.with_suffix(""))


def weights(recipe):
    return load_file(recipe.with_suffix("") / "model" / "model.safetensors")


def gradients(recipe):
    """Their running means, by parameter: the optimizer's first moments."""
    checkpoint = recipe.with_suffix("") / "checkpoints" / "checkpoint-3"
    if (checkpoint / "deepspeed.json").exists():
        return deepspeed_moments(checkpoint)
    saved = tensors_of(checkpoint, "optimizer")
    return {name.removesuffix(".exp_avg"): value for name, value in saved.items() if name.endswith(".exp_avg")}


def deepspeed_moments(checkpoint):
    """Read by DeepSpeed's own converter, which writes a folder for each parameter."""
    universal = checkpoint.parent.parent / "universal"
    (tag,) = checkpoint.glob("global_step*")
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--num_extract_workers", "1"]
    command += [
        "--inject_missing_state",
        "--num_merge_workers",
        "1",
        "--input_folder",
        str(tag),
        "--output_folder",
        str(universal),
    ]
    subprocess.run(command, env=ENVIRONMENT, capture_output=True, check=True, timeout=WAIT)
    files = (universal / "zero").glob("*/exp_avg.pt")
    read = {file.parent.name: torch.load(file, weights_only=False) for file in files}
    return {name: saved["param"] if isinstance(saved, dict) else saved for name, saved in read.items()}


def assert_equal_runs(one, two):
    """Sums in another order: largest relative difference of a term seen 2e-6, of gradients 4e-5, of a weight 3e-8."""
    one_logs, two_logs = logs(one), logs(two)
    assert len(one_logs) == len(two_logs) == 3
    for a, b in zip(one_logs, two_logs, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=5e-5, abs=1e-6), name
    ours, theirs = weights(one), weights(two)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=0, atol=1e-5)
    ours, theirs = gradients(one), gradients(two)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        other = theirs[name].flatten()[: value.numel()].view_as(value)  # ZeRO-3's are flat and padded
        torch.testing.assert_close(other, value, rtol=0, atol=5e-4 * float(value.abs().max()) + 1e-9, msg=name)


def steps_reached(recipe):
    try:
        return len(logs(recipe))
    except (FileNotFoundError, json.JSONDecodeError):
        return 0


def wait_for(condition, run):
    until = time.monotonic() + WAIT
    while not condition():
        assert run.poll() is None, run.communicate()[0][-3000:]
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.002)


def test_the_first_process_looks_for_finished_stages(make):
    recipe = make("ift", "ift", optimization={"max_steps": 1}, launch={"processes": 2})
    for _ in range(2):
        codes, said = train_forked(recipe, (), WAIT, "pipeline")
        assert codes == [0, 0], said[-3000:]
    assert said.count("finished") == 1
    shard = next((recipe.with_suffix("") / "model").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    codes, said = train_forked(recipe, (), WAIT, "pipeline")
    assert codes == [2, 2] and said.count("damaged folder") == 1


@pytest.mark.slow
@pytest.mark.parametrize("images", [9, 3], ids=["both ranks see", "some ranks see no image"])
def test_two_ranks_equal_one_under_every_engine(images, make):
    one = make("pt", "one", images)
    train(one)
    zero = ("zero2", "zero3") if ZERO and images == 3 else ()  # the harder case; each costs half a minute
    for engine in ("ddp", "fsdp", *zero):
        two = make("pt", engine, images, launch={"processes": 2, "engine": engine})
        said = train(two)
        # Equal results prove nothing of sharding: ranks that quietly held everything would give them too.
        share = re.search(r"sharded +([\d.]+)% of the weights on each of 2", said)
        assert (share is not None and 49 < float(share[1]) < 55) if engine == "fsdp" else share is None
        assert_equal_runs(one, two)


IMAGE_TOKENS = {
    "depth": {
        "target": {"kind": "tests.tiny:PooledColors", "model": "colors", "grid": 3},
        "at": "image_tokens",
        "layers": [1, 3],
        "head": {"kind": "mlp", "depth": 2, "width": 16, "shared": True},
        "loss": {"cosine": 1.0, "gram": 0.5, "info_nce": 0.3},
    },
    "own": {
        "target": {"kind": "encoder"},
        "at": "image_tokens",
        "layers": [2],
        "head": {"kind": "linear", "frozen": True},
        "loss": {"smooth_l1": 1.0},
    },
    "early": {
        "target": {"kind": "tests.tiny:PooledColors", "model": "colors"},
        "at": "projector",
        "head": {"kind": "linear"},
        "loss": {"mse": 1.0},
        "schedule": {"end": 0.9},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pt", "ift"])
def test_objectives_at_image_tokens_are_the_same_on_two_ranks_of_which_some_see_no_image(stage, make):
    one = make(stage, "one", 3, distillation={"tasks": IMAGE_TOKENS})
    train(one)
    assert {"depth/3/gram", "own/2/smooth_l1", "early/0/mse"} <= logs(one)[0].keys()
    for engine in ("ddp", "fsdp"):
        two = make(stage, engine, 3, launch={"processes": 2, "engine": engine}, distillation={"tasks": IMAGE_TOKENS})
        train(two)
        assert_equal_runs(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_two_ranks_equal_one_where_rows_of_several_images_are_on_one_of_them(packing, make, tmp_path):
    images = (3, 0, 0, 0, 1, 0)  # two rows of three images among twelve, two of one
    text = tiny.write_rows(tmp_path / "text", images=0, text_rows=5)
    folders = (tmp_path / f"rows-{images}", text)
    data = {"sources": [{"json": str(folder / "rows.json"), "images": str(folder / "images")} for folder in folders]}
    one = make("pt", "one", images, data=data, optimization={"packing": packing, "max_steps": 3})
    train(one)
    assert {"ntp/rows-0", "ntp/rows-1"} <= set().union(*logs(one))
    changes = {"data": data, "launch": {"processes": 2}}
    two = make("pt", "two", images, optimization={"packing": packing, "max_steps": 3}, **changes)
    train(two)
    assert_equal_runs(one, two)


@pytest.mark.slow
def test_two_ranks_evaluate_as_one_does(make, tmp_path):
    """Held-out losses and answers while training, whatever holds the weights."""
    held = tiny.write_rows(tmp_path / "held", images=6, text_rows=2, seed=5)
    rows = json.loads((held / "rows.json").read_text())
    questions = [{"question": "What?", "answer": "a", "image": row["image"]} for row in rows if "image" in row]
    (held / "questions.json").write_text(json.dumps(questions))
    evaluation = {
        "every": 2,
        "loss_on": [{"json": str(held / "rows.json"), "images": str(held / "images")}],
        "questions": str(held / "questions.json"),
        "images": str(held / "images"),
        "max_new_tokens": 3,
        "best": "ntp",
    }
    found = {}
    for name, launch in (("one", {}), ("ddp", {"processes": 2}), ("fsdp", {"processes": 2, "engine": "fsdp"})):
        train(make("pt", name, launch=launch, evaluation=evaluation))
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        logs = [entry for entry in map(json.loads, lines) if "eval/ntp" in entry]
        found[name] = [{key: entry[key] for key in entry if key.startswith("eval/")} for entry in logs]
    for name in ("ddp", "fsdp"):  # each evaluates after steps 2 and 3
        for ours, theirs in zip(found[name], found["one"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)
    half = make(
        "pt",
        "half",
        launch={"processes": 2, "engine": "fsdp"},
        optimization={"precision": "bfloat16", "max_steps": 2},
        evaluation=evaluation | {"draw": 2},
    )
    train(half)
    assert len(list((tmp_path / "half" / "drawings" / "step_000002").iterdir())) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "more"),
    [
        ("vpt", {}),
        ("ift", {"lora": {"rank": 4}}),  # nothing before the decoder is trainable
    ],
)
def test_later_stages_shard_too_and_resume_under_another_engine(stage, more, make, tmp_path):
    images = 3  # some ranks see none: what is summed in the order of arrival must arrive all the same
    one = make(stage, "one", images, **more)
    train(one)
    two = make(stage, "two", images, launch={"processes": 2, "engine": "fsdp"}, **more)
    train(two, "optimization.precision=float32")
    assert_equal_runs(one, two)
    cut_behind_step_2(two, tmp_path / "away")  # what two processes have sharded, one resumes alone
    train(two, "launch.processes=1", "launch.engine=ddp", "--resume")
    assert_equal_runs(one, two)


@pytest.mark.slow
def test_two_ranks_equal_one_where_conversations_are_joined(make, tmp_path):
    joined = {"data": {"join_conversations": True}, "optimization": {"micro_batch": 2}}
    one = make("vpt", "one", **joined)
    rows = tmp_path / "rows-9" / "rows.json"
    changed = json.loads(rows.read_text())
    for number, row in enumerate(changed[:9]):
        row["image"] = f"{number // 3}.png"
    rows.write_text(json.dumps(changed))
    assert re.search("9 conversations about an image share [3-7] images", " ".join(train(one).split()))
    for engine in ("ddp", "fsdp"):
        two = make("vpt", engine, launch={"processes": 2, "engine": engine}, **joined)
        train(two)
        assert_equal_runs(one, two)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "engine", "more"),
    [
        pytest.param("vpt", "zero2", {}, marks=pytest.mark.nightly),
        ("ift", "zero3", {"optimization": {"packing": True, "lr_overrides": {"projector": 2e-3}}}),
    ],
)
def test_deepspeed_resumes_its_own_checkpoints_exactly_and_refuses_others(stage, engine, more, make, tmp_path):
    images = 3
    one = make(stage, "one", images, **more)
    train(one)
    two = make(stage, "two", images, launch={"processes": 2, "engine": engine}, **more)
    train(two)
    assert_equal_runs(one, two)
    expected_logs, expected = logs(two), weights(two)
    cut_behind_step_2(two, tmp_path / "away")
    for other in (("launch.processes=1", "launch.engine=ddp"), ("launch.engine=fsdp",)):
        said = refused(two, *other, "--resume")
        assert f"written by launch.engine={engine} with 2 processes" in said
        assert f"launch.engine={engine} launch.processes=2" in said, "what to do"
    train(two, "--resume")
    assert logs(two) == expected_logs
    assert all(torch.equal(value, expected[name]) for name, value in weights(two).items())
    cut_behind_step_2(one, tmp_path / "one's")
    said = refused(one, "launch.processes=2", f"launch.engine={engine}", "--resume")
    assert "not written by DeepSpeed" in said


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pt", "ift"])
def test_a_run_killed_at_any_moment_continues_bit_for_bit(stage, make):
    often = {"logging": {"save_every": 1}, "optimization": {"max_steps": 7}}  # three steps are an epoch
    whole, cut = make(stage, "whole", **often), make(stage, "cut", **often)
    train(whole)
    staging = cut.with_suffix("") / "checkpoints" / ".staging"
    moments = [
        lambda: steps_reached(cut) >= 2,  # mid-epoch
        (staging / "checkpoint-5" / STATE).exists,  # while a checkpoint is being written
    ]
    for moment in moments:
        run = start(cut, *(["--resume"] if steps_reached(cut) else []))
        wait_for(moment, run)
        run.send_signal(signal.SIGKILL)
        run.communicate()
        assert not (cut.with_suffix("") / "model").exists()
    train(cut, "--resume")
    ours, theirs = weights(whole), weights(cut)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert logs(cut) == logs(whole)


@pytest.mark.slow
def test_told_to_stop_every_process_saves_and_the_run_goes_on(make):
    long = {"optimization": {"max_steps": 400}, "logging": {"save_every": 1000}}
    recipe = make("pt", "long", launch={"processes": 2}, **long)
    run = start(recipe)
    wait_for(lambda: steps_reached(recipe) >= 3, run)
    run.send_signal(signal.SIGTERM)
    said, _ = run.communicate(timeout=WAIT)
    assert run.returncode == 128 + signal.SIGTERM, said[-3000:]
    saved = [p.name for p in (recipe.with_suffix("") / "checkpoints").glob("checkpoint-*")]
    assert len(saved) == 1 and "--resume" in said


@pytest.mark.slow
def test_a_process_that_dies_ends_the_run(make):
    recipe = make("pt", "torn", launch={"processes": 2}, optimization={"max_steps": 400})
    run = start(recipe)
    wait_for(lambda: steps_reached(recipe) >= 1, run)
    children = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    said, _ = run.communicate(timeout=60)
    assert run.returncode == 137 and "the others were stopped" in said


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_run(make):
    recipe = make("pt", "hung", launch={"processes": 2, "timeout_minutes": 0.15}, optimization={"max_steps": 400})
    run = start(recipe)
    wait_for(lambda: steps_reached(recipe) >= 1, run)
    children = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGSTOP)
    said, _ = run.communicate(timeout=90)
    assert run.returncode == 1 and "the others were stopped" in said


@pytest.mark.slow
def test_an_output_in_use_ends_every_process_with_one_line(make, tmp_path):
    recipe = make("ift", "ift")
    with locked(tmp_path / "ift", Console(quiet=True)):
        said = refused(recipe, "launch.processes=2")
    assert said.count("is in use by process") == 1 and "ended with exit code 2" in said, said


def test_processes_that_do_not_divide_the_batch_are_refused(make):
    run = start(make("pt", "odd", launch={"processes": 2}, optimization={"global_batch": 3, "micro_batch": 1}))
    said, _ = run.communicate(timeout=WAIT)
    assert run.returncode == 2 and "is not a multiple of" in said
