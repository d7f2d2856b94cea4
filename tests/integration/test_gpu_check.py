"""The check that a GPU will run: every path of it, tiny, on the CPU."""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

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


@pytest.fixture
def check(monkeypatch):
    monkeypatch.syspath_prepend(str(CHECK.parent))
    spec = importlib.util.spec_from_file_location("gpu_check", CHECK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_steps_of_every_kind_leave_their_results(tmp_path):
    found = results(tmp_path, ("ift", "pt", "lora", "variants", "plan"))
    planned = found.pop("plan")["found"]
    for part in ("pt", "ift", "lora"):
        assert planned[part].keys() <= found[part]["found"].keys() and len(planned[part]) == 3


@pytest.mark.nightly
def test_every_part_leaves_its_result(tmp_path):
    found = results(tmp_path, ("tests", "quickstart", "waits", "resume", "ift", "pt", "lora", "variants", "plan"))
    assert found["quickstart"]["found"]["pt"]["most apart"] < 1e-5
    assert found["resume"]["found"]["most apart"] == 0.0


def test_the_parts_stay_within_nine_minutes(check):
    assert sum(check.BUDGETS.values()) <= check.ALL <= 9 * 60
    assert {*check.BUDGETS, check.PLANNING} == check.PARTS.keys()


def test_a_part_that_fails_is_recorded_and_counted(tmp_path, monkeypatch, check):
    def broken(options):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(check.PARTS, "pt", broken)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--tiny", "--part", "pt", "--out", str(tmp_path / "pt.json")])
    assert check.main() == 1 and "no such kernel" in json.loads((tmp_path / "pt.json").read_text())["found"]["failed"]


def test_what_does_not_fit_in_the_time_is_skipped_and_said(tmp_path, monkeypatch, capsys, check):
    monkeypatch.setattr(check, "ALL", 1)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--tiny", "--parts", "pt", "--out", str(tmp_path)])
    assert check.main() == 0
    assert "pt: skipped" in capsys.readouterr().out
    assert "skipped" in json.loads((tmp_path / "pt.json").read_text())["found"]


def test_a_part_that_takes_too_long_is_ended_with_what_it_started(tmp_path, monkeypatch, check):
    script = tmp_path / "slow.py"
    script.write_text("import subprocess, sys; subprocess.run(['sleep', '600'])", encoding="utf-8")
    options = argparse.Namespace(out=tmp_path)
    process = subprocess.Popen([sys.executable, str(script)], start_new_session=True)
    while not children(process.pid):
        time.sleep(0.05)
    assert not check.ended(options, "pt", process, 0.1)
    assert not children(process.pid)
    assert "not done" in json.loads((tmp_path / "pt.json").read_text())["failed"]


def children(group):
    """Processes of a group, its leader left out, that have not ended."""
    found = subprocess.run(["ps", "-eo", "pid,pgid,stat"], capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    rows = [line.split() for line in found[1:] if line.split()]
    return [pid for pid, own, state in rows if int(own) == group and int(pid) != group and not state.startswith("Z")]


def case_of(check, options, case):
    return sys.modules["gpu_cases"].cases(options, {"one": case, "other": case})


def test_a_case_too_large_for_the_memory_is_run_with_half_the_rows(tmp_path, check):
    def case(size):
        if size > 4:
            raise torch.OutOfMemoryError("no room")
        return {"seconds": {"step": 1.0}}

    options = argparse.Namespace(tiny=True, micro_batch=8, seconds=60.0, out=tmp_path / "pt.json")
    found = case_of(check, options, case)["one"]
    assert found["micro_batch"] == 4 and found["did not fit"] == [8]


def test_a_case_for_which_no_time_is_left_is_skipped(tmp_path, check):
    options = argparse.Namespace(tiny=True, micro_batch=8, seconds=0.2, out=tmp_path / "pt.json")
    found = case_of(check, options, lambda size: time.sleep(0.15) or {})
    assert "micro_batch" in found["one"] and "skipped" in found["other"]
