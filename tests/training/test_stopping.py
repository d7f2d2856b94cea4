"""A signal to the process group, loader processes included, ends a run with a checkpoint."""

import multiprocessing
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
from tests.logs import computed
from visper.training.stopping import start_worker

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
WAIT_S = 120


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_group_saves_and_ends(number, tmp_path, tiny_llm, tiny_encoder):
    recipe = tiny.write_recipe(tmp_path, "ift", tiny_llm, tiny_encoder, max_steps=4000, workers=2)
    command = [sys.executable, "-m", "visper", "train", str(recipe), "logging.every=1000"]
    options = {"env": ENVIRONMENT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    run = subprocess.Popen(command, start_new_session=True, **options)
    log, until = tmp_path / "ift" / "log.jsonl", time.monotonic() + WAIT_S
    while not log.exists():  # the first step is logged
        assert run.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    os.killpg(run.pid, number)
    said, _ = run.communicate(timeout=WAIT_S)
    assert run.returncode == 128 + signal.SIGTERM and "--resume" in said, said[-3000:]
    (saved,) = (tmp_path / "ift" / "checkpoints").glob("checkpoint-*")
    last = computed(tmp_path / "ift")[-1]["step"]
    assert saved.name == f"checkpoint-{last}", "the steps since the last line are logged, too"


@pytest.mark.slow
def test_a_run_that_fails_ends_with_its_loader_processes(tmp_path, tiny_llm, tiny_encoder):
    """When Python exits, it sends SIGTERM to the loader processes that are left, and waits for them."""
    recipe = tiny.write_recipe(tmp_path, "ift", tiny_llm, tiny_encoder, max_steps=4000, workers=2)
    diverges = ["optimization.lr=1e30", "optimization.max_grad_norm=0"]
    command = [sys.executable, "-m", "visper", "train", str(recipe), *diverges]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert done.returncode == 2 and "error the loss is nan" in done.stderr
    assert done.stderr.index("error the loss") > done.stderr.rfind("Traceback"), "torch must not see a failed worker"


class Waits:
    """Rows of which a loader process announces the first, and then works at it until it is ended."""

    def __init__(self, folder):
        self.folder = folder

    def __len__(self):
        return 1

    def __getitem__(self, index):
        (self.folder / str(os.getpid())).touch()
        time.sleep(WAIT_S)


def test_a_loader_process_heeds_sigterm_of_its_parent_alone(tmp_path):
    start = partial(start_worker, None)
    rows = iter(DataLoader(Waits(tmp_path), None, num_workers=1, worker_init_fn=start))
    (worker,) = multiprocessing.active_children()
    while not list(tmp_path.iterdir()):
        time.sleep(0.01)
    for number in ("TERM", "INT"):
        subprocess.run(["kill", f"-{number}", str(worker.pid)], check=True)
    worker.join(1)
    assert worker.is_alive()
    worker.terminate()
    worker.join(WAIT_S)
    assert worker.exitcode == 0
    del rows


class InWorker:
    """The threads of a loader process."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return [thread.name for thread in threading.enumerate()]


def test_a_loader_process_watches_its_parent():
    (threads,) = DataLoader(InWorker(), None, num_workers=1, worker_init_fn=partial(start_worker, None))
    assert "end with parent" in threads
