"""The check that a GPU will run: every path of it, tiny, on the CPU."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHECK = ROOT / "benchmarks" / "gpu_check.py"


def run(out, *arguments):
    command = [sys.executable, str(CHECK), "--tiny", "--out", str(out), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=3000)


def results(out, parts):
    done = run(out, "--parts", *parts)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = {file.stem: json.loads(file.read_text()) for file in out.glob("*.json")}
    assert found.keys() == set(parts)
    assert all(part["torch"] and part["date"] and part["command"] for part in found.values())
    return found


@pytest.mark.slow
def test_the_steps_of_every_kind_leave_their_results(tmp_path):
    results(tmp_path, ("ift", "pt", "lora", "attention"))


@pytest.mark.nightly
def test_every_part_leaves_its_result(tmp_path):
    found = results(tmp_path, ("tests", "quickstart", "waits", "resume", "ift", "pt", "lora", "attention"))
    assert found["quickstart"]["found"]["pt"]["most apart"] < 1e-5
    assert found["resume"]["found"]["most apart"] == 0.0


def test_a_part_that_fails_is_recorded_and_counted(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_check", CHECK)
    check = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check)

    def broken(options):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(check.PARTS, "pt", broken)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--tiny", "--part", "pt", "--out", str(tmp_path / "pt.json")])
    assert check.main() == 1 and "no such kernel" in json.loads((tmp_path / "pt.json").read_text())["found"]["failed"]
