"""Who decides ``gradient_checkpointing: auto``, what a resumed run keeps, and that a given share is estimated."""

import pytest
import torch
from accelerate import PartialState

from visper.common.console import Console
from visper.config import load_run, save_run
from visper.training.output import LOG
from visper.training.recomputation import decide_recomputation


def refuse(run, processes):
    raise AssertionError("asked")


def quickstart(folder, value="auto"):
    return load_run("quickstart/pt", [f"output={folder}", f"optimization.gradient_checkpointing={value}"])


@pytest.fixture
def decide(tmp_path):
    """``decide(choose, gradient_checkpointing)``: the share that the quickstart's run trains with."""

    def decided(choose, value="auto"):
        run = quickstart(tmp_path, value)
        found = decide_recomputation(run, PartialState(cpu=True), choose, Console(quiet=True))
        return found.optimization.gradient_checkpointing

    return decided


def test_a_cpu_recomputes_nothing_and_estimates_nothing(decide):
    assert decide(refuse) == 0.0


def test_a_share_that_is_given_stays_and_the_memory_it_takes_is_said(decide, monkeypatch):
    assert decide(refuse, value=0.25) == 0.25  # on a CPU nothing is estimated
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked = []

    def estimate(run, processes):
        asked.append(run.optimization.gradient_checkpointing)
        return 1.0, "all layers: no estimate"

    assert decide(estimate, value=0.25) == 0.25 and asked == [0.25]


def test_on_a_gpu_the_planner_decides_and_without_it_everything_is_recomputed(decide, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert decide(lambda run, processes: (0.5 * processes, "half")) == 0.5
    assert decide(None) == 1.0


def test_a_resumed_run_keeps_its_share(decide, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    save_run(quickstart(tmp_path, 0.5), tmp_path / "run.yaml")
    (tmp_path / LOG).touch()  # it has taken a step
    assert decide(refuse) == 0.5
