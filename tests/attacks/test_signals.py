"""Signals at random moments, to a run's first process or to its group: resumed, it ends as if nothing had happened."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import tiny
from tests.training.killed import differences, result

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
ROUNDS = int(os.environ.get("VISPER_KILL_ROUNDS", "3"))
STEPS, WAIT_S = 40, 180


class Attacked:
    """One recipe, trained into a folder by the command, with loader processes."""

    def __init__(self, recipe, output, processes):
        self.output, self.said = output, ""
        changes = [f"output={output}", "logging.save_every=3", f"launch.processes={processes}"]
        self.command = [sys.executable, "-m", "visper", "train", str(recipe), *changes, "--resume"]

    def run(self, number=None, to_group=False, after=0.0):
        """Trains until the end, or until the signal ``number`` that comes ``after`` seconds; returns the exit code."""
        options = {"env": ENVIRONMENT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with subprocess.Popen(self.command, start_new_session=True, **options) as run:
            try:
                self.said, _ = run.communicate(timeout=after if number else WAIT_S)
            except subprocess.TimeoutExpired:
                (os.killpg if to_group else os.kill)(run.pid, number)
                self.said, _ = run.communicate(timeout=WAIT_S)
        if "is in use by" in self.said:  # processes of a killed launcher are still ending
            time.sleep(1)
            return self.run(number, to_group, after)
        return run.returncode


@pytest.mark.nightly
@pytest.mark.parametrize("processes", [1, 2])
def test_signals_at_random_moments_change_nothing(processes, tmp_path, tiny_llm, tiny_encoder):
    recipe = tiny.write_recipe(tmp_path, "ift", tiny_llm, tiny_encoder, max_steps=STEPS, workers=2)
    alone, began = Attacked(recipe, tmp_path / "alone", processes), time.monotonic()
    assert alone.run() == 0, alone.said
    took, expected = time.monotonic() - began, result(alone.output)
    for number in range(ROUNDS):
        chance, attacked, sent = random.Random(f"{processes} {number}"), None, []
        attacked = Attacked(recipe, tmp_path / "attacked", processes)
        for _ in range(3):
            sent.append((chance.choice((signal.SIGKILL, signal.SIGTERM)), chance.random() < 0.5))
            ended = attacked.run(*sent[-1], after=chance.uniform(0.3, 1.0) * took)
            assert ended in (0, 143, -signal.SIGKILL, -signal.SIGTERM), (number, sent, attacked.said[-3000:])
            if ended == 0:  # it was faster than alone, and the signal too late
                break
        if ended != 0:
            assert attacked.run() == 0, (number, sent, attacked.said[-3000:])
        assert not differences(expected, result(attacked.output)), (number, sent)
        shutil.rmtree(attacked.output)
