"""Host memory of each process at the start of a sharded run: reading the model, then holding its share.

    python benchmarks/sharded_start.py --processes 2
    python benchmarks/sharded_start.py --processes 4 --width 1024 --layers 16
    python benchmarks/sharded_start.py --engine ddp

The model is a random Llama with the quickstart's tokenizer and encoder, stored in bfloat16; IFT in float32, on gloo.
``peak`` is the kernel's figure (VmHWM, reset before the model is built) above what the process held at the reset. The
peaks of the processes are not simultaneous: ``together`` is the most that all held above that at once, sampled every
5 ms. ``planned`` is the estimate of ``visper plan`` for the first process and the others, without libraries; under
``fsdp`` it includes the shards, which would be on a GPU otherwise. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import socket
import tempfile
import time
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
import transformers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from visper.common.console import Console
from visper.config import Run
from visper.training.parallel.join import join_processes
from visper.training.run import build_model, build_student

BASES = resources.files("visper.quickstart") / "bases"


def kib(field: str, process: int | str = "self") -> int:
    """A field of a process's status in ``/proc``; 0 after it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), 0)


def write_llm(folder: Path, width: int, layers: int) -> None:
    """A random Llama of this size, stored in bfloat16 like published models, and read as float32."""
    tokenizer = AutoTokenizer.from_pretrained(str(BASES / "llm"))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def start(rank: int, processes: int, port: int, settings: dict[str, Any], folder: Path) -> None:
    """Runs one process: builds the model and records its memory."""
    import os

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(processes), RANK=str(rank))
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(processes))
    run = Run.model_validate(settings)
    place = join_processes(run.launch)
    place.wait_for_everyone()
    before, anonymous, began = kib("VmRSS"), kib("RssAnon"), time.process_time()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    console = Console(quiet=True)
    model = build_model(run, build_student(run, place, console), {}, place, console)
    place.wait_for_everyone()
    found: dict[str, float] = {"peak": kib("VmHWM") - before, "held": kib("VmRSS") - before, "before": anonymous}
    found["cpu_s"] = time.process_time() - began
    found["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    (folder / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.destroy_process_group()


def planned(settings: dict[str, Any], processes: int) -> list[float]:
    """Planned MB of the first process and of the others."""
    from visper.planning.host import LIBRARIES
    from visper.planning.memory import Machine
    from visper.planning.plan import Plan

    found = Plan(Run.model_validate(settings), Machine(processes, None))
    start = found.host["start or resume"]
    own = found.memory.parts["weights"] if settings["launch"]["engine"] == "fsdp" else 0.0
    return [round((held - LIBRARIES + own) / 1e6) for held in (start.first, start.other)]


def main() -> None:
    """Writes the model, starts it in several processes, and adds up their memory."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--engine", choices=["fsdp", "ddp"], default="fsdp")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    write_llm(folder / "llm", options.width, options.layers)
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
    (folder / "rows.json").write_text(json.dumps([{"id": "0", "conversations": turns}]), encoding="utf-8")
    settings = {
        "name": "start",
        "stage": "ift",
        "output": str(folder / "out"),
        "student": {"llm": str(folder / "llm"), "encoder": str(BASES / "encoder")},
        "data": {"sources": [{"json": str(folder / "rows.json"), "images": "none"}], "max_tokens": 512},
        "optimization": {"global_batch": options.processes, "lr": 1e-4, "precision": "float32"},
        "launch": {"engine": options.engine},
    }
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.spawn(start, (options.processes, port, settings, folder), nprocs=options.processes, join=False)
    most = 0
    while not context.join(timeout=0.005):
        most = max(most, sum(kib("RssAnon", process) for process in context.pids()))
    found = [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(options.processes)]
    expected = planned(settings, options.processes)
    shutil.rmtree(folder)
    result = {
        "engine": options.engine,
        "planned_mb": expected,
        "processes": options.processes,
        "model_mb": round(found[0]["parameters"] * 4 / 1e6),
        "peak_mb": [round(one["peak"] * 1024 / 1e6) for one in found],
        "held_mb": [round(one["held"] * 1024 / 1e6) for one in found],
        "together_mb": round((most - sum(one["before"] for one in found)) * 1024 / 1e6),
        "cpu_s": round(sum(one["cpu_s"] for one in found), 1),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
