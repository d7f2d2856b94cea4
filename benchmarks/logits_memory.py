"""The memory of the next-token loss, with logits at every position or only at labels.

    python benchmarks/logits_memory.py --out benchmarks/results/logits-memory.json

A vocabulary of 128k, 650 positions per row of which 20 are supervised. ``full`` is what a causal LM of transformers
does with labels; ``ours`` is ``visper.training.next_token``. Each runs in its own process, forward and backward to
the hidden states. Measured is the peak of resident memory above what the process held before (including head and
states).
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from visper.data.collator import supervised_places
from visper.training.next_token import next_token_loss

POSITIONS, SUPERVISED = 650, 20


def resident(field: str) -> float:
    """Resident MiB of this process, now (``VmRSS``) or at the peak so far (``VmHWM``)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def measure(kind: str, rows: int, words: int, width: int) -> dict[str, float]:
    """Peak MiB, CPU seconds and the loss of one forward and backward."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    head = nn.Linear(width, words, bias=False).requires_grad_(False)
    states = torch.randn(rows, POSITIONS, width, requires_grad=True)
    labels = torch.full((rows, POSITIONS), -100)
    labels[:, -SUPERVISED:] = torch.randint(0, words, (rows, SUPERVISED))
    before, start = resident("VmRSS"), time.process_time()
    if kind == "full":
        loss = ForCausalLMLoss(head(states), labels, words, num_items_in_batch=torch.tensor(rows * SUPERVISED))
    else:
        at = supervised_places(labels)
        wanted = labels.flatten()[at + 1]
        total = next_token_loss(states.flatten(0, 1)[at], wanted, head, torch.empty(0, dtype=torch.long), fuse=False)
        loss = total / (rows * SUPERVISED)
    loss.backward()
    seconds = time.process_time() - start
    return {"peak_mib": resident("VmHWM") - before, "cpu_seconds": seconds, "loss": float(loss.detach())}


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--kind", choices=("full", "ours"), help="measure one variant, in this process")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--words", type=int, default=128_256)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.kind:
        print(json.dumps(measure(options.kind, options.rows, options.words, options.width)))
        return
    sizes = [f"--{name}={getattr(options, name)}" for name in ("rows", "words", "width")]
    found = {}
    for kind in ("full", "ours"):
        command = [sys.executable, __file__, f"--kind={kind}", *sizes]
        found[kind] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    report = {
        "command": " ".join(["python", *sys.argv]),
        "machine": f"{platform.machine()} CPU, one thread, float32",
        "torch": torch.__version__,
        "rows": options.rows,
        "words": options.words,
        **found,
        "memory_share": found["ours"]["peak_mib"] / found["full"]["peak_mib"],
    }
    text = json.dumps(report, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
