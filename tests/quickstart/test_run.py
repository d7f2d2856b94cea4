"""Faults of a quickstart are a user's errors: one message, no traceback. Its time is that of all attempts."""

import json
from contextlib import suppress
from types import SimpleNamespace

import pytest

from visper.common.console import Console
from visper.common.errors import ConfigError, TrainingError
from visper.quickstart.run import FAST, Stopwatch, check_learning, prepare_world


def test_a_world_of_another_seed_is_refused(tmp_path):
    sizes = {"seed": 0, "scenes": FAST.scenes, "held_out": FAST.held_out, "per_kind": FAST.per_kind}
    (tmp_path / "world.json").write_text(json.dumps(sizes))
    assert prepare_world(tmp_path, 0, FAST, Console(quiet=True)) == tmp_path
    with pytest.raises(ConfigError, match="another seed or size: choose another --out"):
        prepare_world(tmp_path, 1, FAST, Console(quiet=True))


def test_a_loss_that_does_not_fall_is_named(tmp_path):
    (tmp_path / "pt").mkdir()
    rows = [{"loss": 1.0, "ntp": 2.0 - step / 9, "depth/3/smooth_l1": 1.0} for step in range(9)]
    (tmp_path / "pt" / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(TrainingError, match=r"did not fall.*: pt: depth/3/smooth_l1$"):
        check_learning(SimpleNamespace(out=tmp_path, runs={"pt": None}))


@pytest.fixture
def clock(monkeypatch):
    """``clock(seconds)``: wall-clock time passes, and half as much processor time."""
    now = [0.0]
    monkeypatch.setattr("visper.quickstart.run.time.perf_counter", lambda: now[0])
    monkeypatch.setattr("visper.quickstart.run._cpu_seconds", lambda: now[0] / 2)

    def passes(seconds):
        now[0] += seconds

    return passes


def attempt(file, clock, seconds, interrupted=False, **options):
    """One command, which takes so long, and the times in its file."""
    with suppress(KeyboardInterrupt), Stopwatch(file)("pt", **options):
        clock(seconds)
        if interrupted:
            raise KeyboardInterrupt
    found = Stopwatch(file)
    return found.wall["pt"], found.cpu["pt"]


def test_the_seconds_of_a_part_are_those_of_all_attempts_until_it_is_finished(tmp_path, clock):
    file = tmp_path / "seconds.json"
    assert attempt(file, clock, 10, interrupted=True) == (10, 5)
    assert attempt(file, clock, 6, interrupted=True) == (16, 8)
    assert attempt(file, clock, 4) == (20, 10)
    assert attempt(file, clock, 1) == (20, 10)  # the command is repeated, though all is there
    assert attempt(file, clock, 1, interrupted=True) == (20, 10)


def test_the_seconds_of_a_part_that_begins_anew_are_those_of_its_last_attempt(tmp_path, clock):
    file = tmp_path / "seconds.json"
    attempt(file, clock, 10, interrupted=True, resumes=False)
    assert attempt(file, clock, 4, resumes=False) == (4, 2)


def test_the_seconds_in_a_file_without_finished_parts_are_of_finished_ones(tmp_path, clock):
    file = tmp_path / "seconds.json"
    file.write_text(json.dumps({"wall": {"pt": 9.0}, "cpu": {"pt": 3.0}}))
    assert attempt(file, clock, 1) == (9, 3)
