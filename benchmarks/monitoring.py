"""The cost of monitoring: seconds per step of everything the monitor does, beside the step itself.

python benchmarks/monitoring.py RUN_OUTPUT/log.jsonl     # a log of the quickstart, for its seconds per step
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from visper.config import load_run
from visper.data.collator import Sizes
from visper.training.global_batch import count
from visper.training.monitor import PARTS, RunMonitor


def main() -> None:
    """Prints one line."""
    torch.set_num_threads(1)
    logs = [json.loads(line) for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()]
    step = statistics.median(log["step_s"] for log in logs if "step_s" in log)
    watch = RunMonitor(load_run("quickstart/pt").logging.monitor, Accelerator(cpu=True))
    model = nn.Module()
    model.objective = nn.Module()
    model.objective.predictors = nn.ModuleList(nn.Linear(83, 83) for _ in range(100))  # 0.7M trainable parameters
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    sizes = Sizes((141,) * 16, 16, 0, 16 * 141**2)
    batch = {"labels": torch.ones(16, 141), "image_rows": range(16), "sample_ids": ["row"] * 16, "sizes": sizes}
    seconds = []
    for number in range(200):
        start = time.perf_counter()
        for part in PARTS:
            watch.clock.mark(part)
        watch.counted(count([batch], watch.accelerator, False, watch.unlabeled([batch])), number)
        watch.see({"loss": torch.tensor(1.0 / (number + 1)), "ntp": torch.tensor(1.0)}, batch)
        watch.settle(number)
        if number % 10 == 0:
            watch.norms(model)
            watch.report({"ntp": float(number)}, 10, number)
        seconds.append(time.perf_counter() - start)
    mean = statistics.mean(seconds[20:])
    print(f"monitoring {mean * 1e3:.3f} ms per step of {step * 1e3:.0f} ms: {mean / step:.2%}")


if __name__ == "__main__":
    main()
