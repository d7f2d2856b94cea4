"""The cost of a checkpoint: the pause in training, host memory for writing and resuming, bytes read.

    python benchmarks/checkpoints.py --processes 2 4 --out benchmarks/results/checkpoints.json

A stack of linear layers with AdamW, sharded over gloo processes (``fsdp``) or replicated (``ddp``), trains a few steps,
writes a checkpoint as training does, and continues training while it is written; other processes resume it. Memory is
the kernel's peak (VmHWM, reset before) minus what the process held at the reset. Prints one line of JSON and a table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.futures import Future

from visper.training import checkpoint
from visper.training.checkpoint_writer import CheckpointWriter

NAME = "checkpoint-1"
USUAL = 3
"""Number of steps before the checkpoint, and while it is written."""


class CountingReader(HuggingFaceStorageReader):
    """Counts the bytes that this process reads from the shards."""

    taken = 0

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Counts the bytes of ``plan`` and reads them."""
        CountingReader.taken += sum(planner.resolve_tensor(item).nbytes for item in plan.items)
        return super().read_data(plan, planner)


def resident(field: str) -> int:
    """Resident bytes of this process: now (``VmRSS``), or the peak since ``forget_peak`` (``VmHWM``)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


def forget_peak() -> int:
    """Resets the peak to the current resident bytes, and returns them."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return resident("VmRSS")


def build(layers: int, width: int, engine: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model and an optimizer without state."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    if engine == "fsdp":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), fused=True)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, width: int) -> float:
    """Takes one step on eight rows and returns its seconds."""
    began = time.perf_counter()
    model(torch.ones(8, width)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - began


def write(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, width: int) -> dict[str, float]:
    """Trains, writes a checkpoint, and continues training while it is written."""
    step(model, optimizer, width)
    usual = [step(model, optimizer, width) for _ in range(USUAL)]
    writer = CheckpointWriter(folder, 1, dist.get_rank() == 0, timedelta(minutes=30))
    staged = folder / checkpoint.FOLDER / checkpoint.STAGING / NAME
    staged.mkdir(parents=True, exist_ok=True)
    held, began, cpu = forget_peak(), time.perf_counter(), time.process_time()
    writer.write(checkpoint.state_of(model, optimizer), staged)
    writer.complete(NAME, None)
    found = {"pause_s": time.perf_counter() - began, "pause_cpu_s": time.process_time() - cpu}
    beside = [step(model, optimizer, width) for _ in range(USUAL)]
    writer.wait()
    found |= {"written_s": time.perf_counter() - began, "usual_step_s": statistics.median(usual)}
    found["step_beside_s"] = statistics.median(beside)
    found["peak_mb"] = (resident("VmHWM") - held) / 1e6
    writer.close()
    return found


def resume(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, width: int) -> dict[str, float]:
    """Resumes the checkpoint; each process reads its own shards."""
    checkpoint.HuggingFaceStorageReader = CountingReader  # type: ignore[misc]
    held, began, cpu = forget_peak(), time.perf_counter(), time.process_time()
    checkpoint.load_weights(model, folder / checkpoint.FOLDER / NAME)
    checkpoint.load_optimizer(model, optimizer, folder / checkpoint.FOLDER / NAME)
    found = {"resumed_s": time.perf_counter() - began, "cpu_s": time.process_time() - cpu}
    found["peak_mb"], found["held_mb"] = (resident("VmHWM") - held) / 1e6, (resident("VmRSS") - held) / 1e6
    found["read_mb"] = CountingReader.taken / 1e6
    return found


def worker(rank: int, folder: Path, processes: int, work: str, engine: str, layers: int, width: int) -> None:
    """Runs one process of one measurement and writes its result to a file."""
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous-{work}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=processes)
    model, optimizer = build(layers, width, engine)
    found = {"write": write, "resume": resume}[work](folder, model, optimizer, width)
    (folder / f"{work}-{rank}.json").write_text(json.dumps({key: round(value, 3) for key, value in found.items()}))
    dist.destroy_process_group()


def measure(processes: int, engine: str, layers: int, width: int, parent: Path | None) -> dict[str, Any]:
    """Both measurements of one engine: each key's values for all processes, and the size on disk."""
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=parent))
    result: dict[str, Any] = {"engine": engine, "processes": processes}
    for work in ("write", "resume"):
        mp.spawn(worker, (folder, processes, work, engine, layers, width), nprocs=processes)
        ranks = [json.loads((folder / f"{work}-{rank}.json").read_text()) for rank in range(processes)]
        result[work] = {key: [rank[key] for rank in ranks] for key in ranks[0]}
    files = (folder / checkpoint.FOLDER / NAME).rglob("*")
    result["disk_mb"] = round(sum(file.stat().st_size for file in files if file.is_file()) / 1e6, 1)
    shutil.rmtree(folder)
    return result


def table(found: list[dict[str, Any]]) -> str:
    """A Markdown table with the figures of the slowest or largest process."""
    lines = [
        "| engine, processes | MB | step s | pause s | CPU s | step beside s | + MB, write | + MB, resume | MB read |"
    ]
    lines.append("|---" * 9 + "|")
    for one in found:
        writing, resuming = one["write"], one["resume"]
        figures = [max(writing[key]) for key in ("usual_step_s", "pause_s", "pause_cpu_s", "step_beside_s")]
        sizes = [max(writing["peak_mb"]), max(resuming["peak_mb"]), max(resuming["read_mb"])]
        cells = [f"{one['disk_mb']:.0f}", *(f"{value:.2f}" for value in figures), *(f"{size:.0f}" for size in sizes)]
        lines.append(f"| `{one['engine']}`, {one['processes']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Prints one line of JSON and a table; writes the JSON to ``--out``."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--engines", nargs="+", default=["fsdp", "ddp"], choices=["fsdp", "ddp"])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--folder", type=Path, help="folder of the checkpoints; default: a temporary folder")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = [
        measure(processes, engine, options.layers, options.width, options.folder)
        for engine in options.engines
        for processes in options.processes
    ]
    result = {
        "weights_mb": round(options.layers * options.width**2 * 4 / 1e6, 1),
        "runs": found,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load": os.getloadavg()[0],
        "torch": version("torch"),
    }
    print(json.dumps(result))
    print(table(found))
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
