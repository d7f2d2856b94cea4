"""Benchmarks run, as small as they can be: a figure in the docs names the command that gives it.

Those that start processes, or need photographs, the results of a quickstart or a GPU are run by hand.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
COMMANDS = {
    "build_targets": ("--images", "8", "--folder", "{out}"),
    "loader": ("--images", "8", "--batch", "4", "--epochs", "1", "--geometry", "squash"),
    "logits_memory": ("--rows", "1", "--words", "1000", "--width", "16"),
    "packing": ("--batch", "8", "--steps", "1", "--rounds", "1", "--width", "64", "--layers", "2"),
    "pretraining_step": ("tiny", "--micro-batch", "2", "--steps", "1"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_benchmark_runs(name, tmp_path):
    arguments = [argument.format(out=tmp_path / "out") for argument in COMMANDS[name]]
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip()


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_reads_of_stored_targets_are_timed_on_the_right_ones(dtype, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import targets
    import torch

    from visper.distillation import TargetSpec
    from visper.target_store.quantize import TargetCodec

    codec = TargetCodec(TargetSpec(4, 8), dtype)
    tmp_path.joinpath("store").mkdir()
    targets.fill(tmp_path / "store", codec, parts=2, each=3)
    stored = targets.stored_targets(tmp_path / "store", 3, codec)
    mapped = targets.mapped_targets(tmp_path / "store", 3, codec)
    for number in range(6):
        values, _ = codec.unpack(stored(number)[None])
        assert torch.equal(values[0], torch.from_numpy(mapped(number)))


def test_results_are_json_that_names_its_command():
    for file in (BENCHMARKS / "results").glob("*.json"):
        assert "command" in json.dumps(json.loads(file.read_text())), file
