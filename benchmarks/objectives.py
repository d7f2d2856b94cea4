"""The cost of an objective in fine-tuning: CPU seconds per step and peak memory, compared with plain IFT.

Uses the quickstart's student, data and batch. Each arm runs in its own process, with one thread, in float32, with a
live teacher if the target has one. An arm runs twice, for 15 and 55 steps: the difference is 40 steps without
start-up.

    visper quickstart --fast --out /tmp/quickstart          # the world, the bases and a PT to start from
    python benchmarks/objectives.py /tmp/quickstart
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from time import process_time
from typing import Any

DEPTH = {"kind": "visper.quickstart.tower:TowerTeacher"}
MLP = {"kind": "mlp", "depth": 3, "width": 64}
ARMS: dict[str, dict[str, Any] | None] = {
    "plain IFT": None,
    "task_tokens, resampler": {"layers": [2]},
    "image_tokens, resampler": {"at": "image_tokens", "layers": [2]},
    "image_tokens, mlp, cosine": {"at": "image_tokens", "layers": [2], "head": MLP, "loss": {"cosine": 1.0}},
    "image_tokens, mlp, gram": {"at": "image_tokens", "layers": [2], "head": MLP, "loss": {"gram": 1.0}},
    "image_tokens, own projector": {
        "at": "image_tokens",
        "layers": [2],
        "head": MLP,
        "loss": {"cosine": 1.0},
        "target": {"kind": "projector"},
    },
    "projector, mlp, cosine": {"at": "projector", "head": MLP, "loss": {"cosine": 1.0}},
}
SHORT, LONG = 15, 55


def train(quickstart: Path, arm: str, steps: int) -> None:
    """Runs once, in this process, and prints CPU seconds and peak memory as JSON."""
    from visper.config import load_run
    from visper.training import run_stage

    task = ARMS[arm]
    teacher = {**DEPTH, "model": str(quickstart / "bases" / "teacher_depth")}
    world = quickstart / "world"
    with tempfile.TemporaryDirectory() as folder:
        changes = {
            "output": f"{folder}/run",
            "start_from": str(quickstart / "pt"),
            "data": {
                "sources": [{"json": str(world / "instruct.json"), "images": str(world / "images")}],
                "workers": 0,
            },
            "distillation": None if task is None else {"tasks": {"depth": {"target": teacher, **task}}},
            "optimization": {"max_steps": steps},
            "logging": {"save_every": 1000},
        }
        before = process_time()
        run_stage(load_run("quickstart/ift", changes=(changes,)))
        seconds = process_time() - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"seconds": seconds, "peak_gib": peak}))


def main() -> None:
    """Prints a Markdown table."""
    quickstart = Path(sys.argv[1])
    if len(sys.argv) > 2:
        train(quickstart, sys.argv[2], int(sys.argv[3]))
        return
    print("| objective in IFT | CPU s per step | relative to plain | peak GiB |\n|---|---|---|---|")
    plain = 0.0
    for arm in ARMS:
        found = []
        for steps in (SHORT, LONG):
            command = [sys.executable, __file__, str(quickstart), arm, str(steps)]
            said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found.append(json.loads(said.splitlines()[-1]))
        step = (found[1]["seconds"] - found[0]["seconds"]) / (LONG - SHORT)
        plain = plain or step
        print(f"| {arm} | {step:.3f} | {step / plain:.2f} | {found[1]['peak_gib']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
