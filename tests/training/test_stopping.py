"""A signal to the process group, loader processes included, ends a run with a checkpoint."""

import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from tests import tiny
from visper.training.stopping import start_worker

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
WAIT_S = 120


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_group_saves_and_ends(number, tmp_path, tiny_llm, tiny_encoder):
    recipe = tiny.write_recipe(tmp_path, "ift", tiny_llm, tiny_encoder, max_steps=4000, workers=2)
    command = [sys.executable, "-m", "visper", "train", str(recipe)]
    options = {"env": ENVIRONMENT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    run = subprocess.Popen(command, start_new_session=True, **options)
    log, until = tmp_path / "ift" / "log.jsonl", time.monotonic() + WAIT_S
    while not (log.exists() and len(log.read_text().splitlines()) >= 3):
        assert run.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    os.killpg(run.pid, number)
    said, _ = run.communicate(timeout=WAIT_S)
    assert run.returncode == 128 + signal.SIGTERM and "--resume" in said, said[-3000:]
    assert len(list((tmp_path / "ift" / "checkpoints").glob("checkpoint-*"))) == 1


class InWorker:
    """What a loader process does with its signals, and its threads."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return signal.getsignal(signal.SIGTERM), [thread.name for thread in threading.enumerate()]


def test_a_loader_process_ignores_stop_signals_and_watches_its_parent():
    ((handler, threads),) = DataLoader(InWorker(), None, num_workers=1, worker_init_fn=partial(start_worker, None))
    assert handler == signal.SIG_IGN and "end with parent" in threads
