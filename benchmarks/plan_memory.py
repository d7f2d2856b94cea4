"""Compares the memory that ``visper plan`` estimates for a run on a CPU with the run's measured peak.

    python benchmarks/plan_memory.py quickstart/pt --steps 6 output=/tmp/pt
    python benchmarks/plan_memory.py photographs/pt --steps 3 output=/tmp/pt student.llm=... data.sources='[...]'

The plan is made in one process. The run (``--steps`` steps, the last of which saves a checkpoint, then the finished
model) is another; its peak is the kernel's figure for that process (``ru_maxrss``), without loader workers. Prints one
line of JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from visper.config import Run, load_run


def planned(run: Run) -> dict[str, Any]:
    """Planned bytes by part."""
    from visper.planning.memory import Machine
    from visper.planning.plan import Plan

    memory = Plan(run, Machine(0, None)).memory
    return {"planned": memory.total, "parts": dict(memory.parts)}


def measured(run: Run) -> dict[str, Any]:
    """The peak after the last log of training, and at the end."""
    from visper.training import run_stage

    run_stage(run)
    logs = [json.loads(line) for line in (Path(run.output) / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = max(log["memory_gib"] for log in logs if "memory_gib" in log)
    return {"measured_steps": steps * 2**30, "measured": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def main() -> None:
    """Plans, runs, compares."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--only", choices=("planned", "measured"), help="internal: one half, in this process")
    options = parser.parse_intermixed_args()
    if options.only is None:
        result: dict[str, Any] = {"recipe": options.recipe}
        for half in ("planned", "measured"):
            said = subprocess.run([sys.executable, *sys.argv, "--only", half], check=True, stdout=subprocess.PIPE)
            result |= json.loads(said.stdout.splitlines()[-1])
        result["planned / measured"] = round(result["planned"] / result["measured"], 3)
        print(json.dumps(result))
        return
    torch.set_num_threads(1)
    changes = [
        *options.overrides,
        f"optimization.max_steps={options.steps}",
        "logging.every=1",
        "logging.save_every=500",
    ]
    run = load_run(options.recipe, changes)
    print(json.dumps((planned if options.only == "planned" else measured)(run)))


if __name__ == "__main__":
    main()
