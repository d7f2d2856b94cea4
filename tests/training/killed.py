"""Kills training with SIGKILL at random moments, again and again, goes on each time, and compares with a run that was
left alone: run by test_killed.py.

A moment is any touch of a file of the output (Python's audit events) or any forward. Each run is a fork of this
process, which has one thread.

    python -m tests.training.killed RUN.yaml FOLDER SEED ROUNDS
"""

import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.data.sets.killed import in_fork
from tests.logs import computed
from visper.config import load_run
from visper.training import run_stage
from visper.training.trainer import StageTrainer

torch.set_num_threads(1)


def run(recipe: str, output: Path, die_at: int = 0, count_to: Path | None = None) -> None:
    passed = 0

    def step() -> None:
        nonlocal passed
        passed += 1
        if passed == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_event(event: str, arguments: tuple) -> None:
        if (event == "open" or event.startswith("os.")) and str(output) in str(arguments[:2]):
            step()

    forward = StageTrainer.compute_loss
    StageTrainer.compute_loss = lambda *args, **more: (step(), forward(*args, **more))[1]
    sys.addaudithook(on_event)
    with Path(os.devnull).open("w") as silence:
        os.dup2(silence.fileno(), 1)
    run_stage(load_run(recipe, [f"output={output}"]), resume=True)
    if count_to is not None:
        count_to.write_text(str(passed))


def result(output: Path) -> tuple[list, dict]:
    return computed(output), load_file(output / "model" / "model.safetensors")


def differences(one: tuple[list, dict], two: tuple[list, dict]) -> list[str]:
    steps = [entry["step"] for entry, other in zip(one[0], two[0], strict=False) if entry != other]
    names = [n for n in one[1].keys() | two[1].keys() if n not in two[1] or not torch.equal(one[1][n], two[1][n])]
    return [*(["steps logged"] if len(one[0]) != len(two[0]) else []), *map(str, steps), *names]


def main() -> None:
    recipe, folder, seed, rounds = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    chance = random.Random(seed)
    assert in_fork(lambda: run(recipe, folder / "alone", count_to=folder / "count")) == 0
    moments, expected = int((folder / "count").read_text()), result(folder / "alone")
    kills, differing = 0, []
    output = folder / "killed"
    for number in range(rounds):
        points = []
        while True:
            points.append(chance.randint(1, moments))
            ended = in_fork(lambda at=points[-1]: run(recipe, output, at))
            kills += ended == signal.SIGKILL
            finished = (output / "model").exists()  # killed behind its last act
            if ended != signal.SIGKILL or finished or len(points) == 3:
                break
        if not (output / "model").exists():
            ended = in_fork(lambda: run(recipe, output))
        found = ["failed"] if ended not in (0, signal.SIGKILL) else differences(expected, result(output))
        if found:
            differing.append((number, points, found[:5]))
        shutil.rmtree(output)
    print(json.dumps({"moments": moments, "rounds": rounds, "kills": kills, "differing": differing}))


if __name__ == "__main__":
    main()
