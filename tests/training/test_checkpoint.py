"""A damaged checkpoint is named and set aside, and the newest good one taken."""

import json
import tracemalloc
from datetime import timedelta
from io import StringIO
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from tests import tiny
from visper.common.console import Console
from visper.common.errors import ConfigError, DataError, TrainingError
from visper.common.manifest import MANIFEST, find_damage
from visper.config import load_run, save_run
from visper.model import load_student
from visper.training import checkpoint, run_stage
from visper.training.checkpoint import FOLDER, STAGING, checkpoints, complete, newest_undamaged
from visper.training.checkpoint_writer import CheckpointWriter, ShardWriter
from visper.training.output import newest_own


def save(output: Path, *steps: int, keep: int = 9) -> None:
    for step in steps:
        staged = output / FOLDER / STAGING / f"checkpoint-{step}"
        staged.mkdir(parents=True)
        (staged / "model.safetensors").write_bytes(b"weights of " + str(step).encode())
        complete(output, staged.name, keep)


def flip(file: Path, at: int = -1) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 4
    file.write_bytes(content)


def weights(output: Path, step: int) -> Path:
    return output / FOLDER / f"checkpoint-{step}" / "model.safetensors"


def names(output: Path) -> set[str]:
    return {path.name for path in (output / FOLDER).glob("checkpoint-*")}


def test_the_newest_undamaged_one_is_taken_and_the_damaged_ones_are_named(tmp_path: Path) -> None:
    save(tmp_path, 2, 4, 6, 10)
    flip(weights(tmp_path, 10))
    weights(tmp_path, 6).write_bytes(b"w")
    said = StringIO()
    assert newest_undamaged(tmp_path, Console(file=said, width=999)) == tmp_path / FOLDER / "checkpoint-4"
    assert names(tmp_path) == {"checkpoint-2", "checkpoint-4", "checkpoint-6.damaged", "checkpoint-10.damaged"}
    assert "checkpoint-10' is damaged (the content of 'model.safetensors' has changed" in said.getvalue()
    assert "checkpoint-6' is damaged ('model.safetensors' has 1 bytes, expected 12)" in said.getvalue()


def test_one_without_its_manifest_is_incomplete(tmp_path: Path) -> None:
    save(tmp_path, 2, 4)
    (tmp_path / FOLDER / "checkpoint-4" / MANIFEST).unlink()
    assert newest_undamaged(tmp_path, Console(quiet=True)) == tmp_path / FOLDER / "checkpoint-2"


def test_one_that_was_copied_from_another_run_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 2)
    run, checkpoint = load_run("quickstart/pt", [f"output={tmp_path}"]), tmp_path / FOLDER / "checkpoint-2"
    save_run(run, checkpoint / "run.yaml")
    assert newest_own(run, tmp_path, Console(quiet=True)) == checkpoint
    save_run(run.model_copy(update={"seed": 7}), checkpoint / "run.yaml")
    with pytest.raises(ConfigError, match="checkpoint-2' is of another run: seed is 7 there, 0 here"):
        newest_own(run, tmp_path, Console(quiet=True))


def test_with_none_left_the_error_says_what_to_do_each_time(tmp_path: Path) -> None:
    assert newest_undamaged(tmp_path, Console(quiet=True)) is None
    save(tmp_path, 2)
    flip(weights(tmp_path, 2))
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"is damaged \(checkpoint-2\.damaged\): restore one .* or remove"):
            newest_undamaged(tmp_path, Console(quiet=True))


def test_damaged_ones_do_not_count_as_kept(tmp_path: Path) -> None:
    save(tmp_path, 2, 4)
    flip(weights(tmp_path, 4))
    newest_undamaged(tmp_path, Console(quiet=True))
    save(tmp_path, 4, keep=2)
    assert names(tmp_path) == {"checkpoint-2", "checkpoint-4", "checkpoint-4.damaged"}
    save(tmp_path, 6, keep=1)
    assert names(tmp_path) == {"checkpoint-6", "checkpoint-4.damaged"}


def test_older_ones_stay_when_the_new_one_does_not_read_as_written(tmp_path: Path, monkeypatch) -> None:
    save(tmp_path, 2, 4)
    monkeypatch.setattr(checkpoint, "flush_names", lambda place: flip(weights(tmp_path, 6)))
    with pytest.raises(TrainingError, match=r"checkpoint-6' is damaged right after writing .* check the disk"):
        save(tmp_path, 6, keep=1)
    assert newest_undamaged(tmp_path, Console(quiet=True)) == tmp_path / FOLDER / "checkpoint-4"


def test_shards_are_written_without_a_copy_in_python(tmp_path: Path) -> None:
    state = {"weight": torch.zeros(1 << 23)}  # 32 MiB
    tracemalloc.start()
    dcp.save(state, storage_writer=ShardWriter(str(tmp_path), save_distributed=True), no_dist=True)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    (shard,) = tmp_path.glob("*.safetensors")
    assert torch.equal(load_file(shard)["weight"], state["weight"]) and peak < 1 << 24
    (tmp_path / "any").touch()
    assert shard.stat().st_mode == (tmp_path / "any").stat().st_mode  # safetensors' own only their owner can read


def test_a_run_goes_on_from_the_one_before_and_ends_as_if_nothing_had_happened(
    tmp_path: Path, tiny_llm, tiny_encoder, capsys
) -> None:
    recipe = tiny.write_recipe(tmp_path, "ift", tiny_llm, tiny_encoder, max_steps=4)
    run = load_run(recipe, ["logging.save_every=2", "logging.keep_checkpoints=2"])
    output = Path(run.output)
    run_stage(run)
    expected = load_file(output / "model" / "model.safetensors")
    folder = output / FOLDER / "checkpoint-4"
    entries = json.loads((folder / MANIFEST).read_text())
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    (shard,) = (name for name in entries if name.endswith(".safetensors"))
    assert load_run(folder / "run.yaml") == load_run(output / "run.yaml")
    assert entries.keys() | {MANIFEST} == files
    (output / "model").rename(tmp_path / "finished")
    flip(folder / shard, (folder / shard).stat().st_size // 2)
    run_stage(run, resume=True)
    assert f"checkpoint-4' is damaged (the content of '{shard}'" in " ".join(capsys.readouterr().out.split())
    found = load_file(output / "model" / "model.safetensors")
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert [path.name for path in checkpoints(output)] == ["checkpoint-2", "checkpoint-4"]


def test_a_finished_folder_with_damaged_weights_is_not_loaded(tmp_path: Path, tiny_llm, tiny_encoder) -> None:
    run = load_run(tiny.write_recipe(tmp_path, "ift", tiny_llm, tiny_encoder, max_steps=1))
    model = run_stage(run)
    (model / "generation_config.json").write_text("{}")  # may be changed by hand
    load_student(run.output)
    flip(model / "model.safetensors")
    with pytest.raises(DataError, match=r"the content of 'model\.safetensors' has changed since it was written"):
        load_student(run.output)
    assert find_damage(model) is not None


def test_a_parameter_that_had_no_gradient_yet_resumes_without_a_state(tmp_path: Path) -> None:
    def trained(steps: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = torch.nn.ModuleDict({"used": torch.nn.Linear(3, 2), "waiting": torch.nn.Linear(3, 2)})
        optimizer = torch.optim.AdamW(model.parameters())
        for step in range(steps):
            for parameter in model["used"].parameters():
                parameter.grad = torch.full_like(parameter, 0.1 + step)
            optimizer.step()
        return model, optimizer

    model, optimizer = trained(steps=2)
    staged = tmp_path / FOLDER / STAGING / "checkpoint-2"
    staged.mkdir(parents=True)
    writer = CheckpointWriter(tmp_path, 1, True, timedelta(minutes=5))
    writer.write(checkpoint.state_of(model, optimizer), staged)
    writer.complete(staged.name, None)
    writer.wait()
    writer.close()

    fresh, resumed = trained(steps=0)
    checkpoint.load_optimizer(fresh, resumed, tmp_path / FOLDER / staged.name)
    states = {name: resumed.state.get(parameter, {}) for name, parameter in fresh.named_parameters()}
    assert states["waiting.weight"] == states["waiting.bias"] == {}
    for name, parameter in model.named_parameters():
        assert all(torch.equal(value, states[name][kind]) for kind, value in optimizer.state[parameter].items())
    assert states["used.weight"]["step"] == 2
