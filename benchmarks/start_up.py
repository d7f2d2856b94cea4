"""CPU seconds from a command's start to its result: help, a plan, a repeated check of rows, the first training step.

    visper quickstart --fast --out visper-quickstart          # once: bases and rows
    OMP_NUM_THREADS=1 python benchmarks/start_up.py --repeats 3

Each command runs in its own process, which ends by itself; a training is stopped once its log has the first step. CPU
seconds are those of that process, without loader workers. Prints one line of JSON per command.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

VISPER = (sys.executable, "-m", "visper")
ROWS = "visper-quickstart/world"
COMMANDS: dict[str, tuple[str, ...]] = {
    "--version": ("--version",),
    "--help": ("--help",),
    "recipes": ("recipes",),
    "plan llama3-8b-vit-l/pt": ("plan", "llama3-8b-vit-l/pt", "--gpus", "8"),
    "data check, again": ("data", "check", f"{ROWS}/pretrain.json", "--images", f"{ROWS}/images"),
    "data check --run, again": (
        *("data", "check", f"{ROWS}/pretrain.json", "--images", f"{ROWS}/images", "--run", "quickstart/pt"),
    ),
    "train quickstart/pt, to the first step": ("train", "quickstart/pt", "output=OUT"),
}


def to_the_end(command: tuple[str, ...]) -> float:
    """CPU seconds of the command and of the processes it waited for."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*VISPER, *command], stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def to_the_first_step(command: tuple[str, ...], output: Path) -> float:
    """CPU seconds of a training until its first step is logged; it is stopped then."""
    process = subprocess.Popen([*VISPER, *command], stdout=subprocess.DEVNULL)
    log = output / "log.jsonl"
    while not (log.exists() and log.stat().st_size):
        if process.poll() is not None:
            raise SystemExit(f"the training ended with exit code {process.returncode} before its first step")
        time.sleep(0.02)
    fields = Path(f"/proc/{process.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Prints one line per command: the median and all figures."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=list(COMMANDS), choices=COMMANDS)
    options = parser.parse_args()
    for name in options.only:
        taken = []
        for _ in range(options.repeats):
            folder = Path(tempfile.mkdtemp())
            command = tuple(part.replace("OUT", str(folder / "out")) for part in COMMANDS[name])
            trains = command[0] == "train"
            taken.append(to_the_first_step(command, folder / "out") if trains else to_the_end(command))
            shutil.rmtree(folder)
        print(json.dumps({"command": name, "median": round(statistics.median(taken), 2), "all": taken}), flush=True)


if __name__ == "__main__":
    main()
