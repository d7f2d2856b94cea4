"""One call for one GPU, at most nine minutes: what this library does there, and what that costs.

    make wheels                                     # where a network is; carry the folder wheels/ along
    python benchmarks/gpu_check.py                  # one 80 GB GPU: torch, transformers, accelerate, no network
    python benchmarks/gpu_check.py --tiny           # every path on the CPU, in a minute

Each part is a process with a time budget and writes ``OUT/PART.json`` as soon as it is done; one that fails, or runs
out of time, leaves its traceback there and does not stop the next. The exit code is the number of failed parts.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu_check"
WHEELS = ROOT / "wheels"
BUDGETS = {"tests": 40, "quickstart": 90, "waits": 30, "resume": 60, "ift": 80, "pt": 80, "lora": 60, "attention": 80}
"""Seconds of each part, in this order: the most telling first. Their sum is under nine minutes."""
STEPS = 50
Part = Callable[[argparse.Namespace], dict[str, Any]]


def device_of(options: argparse.Namespace) -> str:
    """``cuda``, or ``cpu`` where the check is tiny or there is no GPU."""
    import torch

    return "cuda" if torch.cuda.is_available() and not options.tiny else "cpu"


def tests(options: argparse.Namespace) -> dict[str, Any]:
    """The tests that need a GPU; on a CPU they are collected and skipped."""
    if importlib.util.find_spec("pytest") is None:
        return {"skipped": "pytest is not installed: carry its wheel in wheels/"}
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "tests/training/test_lora.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 5):
        raise RuntimeError(done.stdout[-4000:] + done.stderr[-2000:])
    return {"said": done.stdout.splitlines()[-1]}


def quickstart_runs(folder: Path, options: argparse.Namespace, precision: str, steps: int, name: str) -> dict[str, Any]:
    """The quickstart's PT and IFT under ``folder/name``, in this precision."""
    from visper.common.console import Console
    from visper.quickstart.run import FAST, copy_bases, prepare_world, stage_runs

    world = prepare_world(folder / "world", 0, FAST, Console(quiet=True))
    out = folder / name
    copy_bases(out / "bases")
    runs = stage_runs(out, world, 0, FAST)
    for stage, run in runs.items():
        optimization = run.optimization.model_copy(update={"precision": precision, "max_steps": steps})
        logging = run.logging.model_copy(update={"every": 1, "save_every": max(1, steps // 2)})
        runs[stage] = run.model_copy(update={"optimization": optimization, "logging": logging})
    return runs


def logged(output: str) -> list[dict[str, float]]:
    """The lines of a run's log that hold a loss."""
    lines = (Path(output) / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if "loss" in line]


def quickstart(options: argparse.Namespace) -> dict[str, Any]:
    """PT and IFT through the real trainer, in bfloat16 on the GPU and in float32 on its host's CPU."""
    from visper.training import run_stage

    steps = 3 if options.tiny else STEPS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found: dict[str, Any] = {}
        if options.on_cpu:
            for stage, run in quickstart_runs(folder, options, "float32", steps, "cpu").items():
                run_stage(run)
                found[stage] = [line["loss"] for line in logged(run.output)]
            return found
        reference = subprocess.Popen(
            [sys.executable, __file__, "--part", "quickstart", "--on-cpu", "--out", str(folder / "cpu.json")]
            + ["--tiny"] * options.tiny,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1" if options.tiny else "8"},
        )
        precision = "float32" if device_of(options) == "cpu" else "bfloat16"
        for stage, run in quickstart_runs(folder, options, precision, steps, "own").items():
            run_stage(run)
            found[stage] = logged(run.output)
        assert reference.wait() == 0, "the reference on the CPU failed: see its traceback above"
        on_cpu = json.loads((folder / "cpu.json").read_text(encoding="utf-8"))
    result: dict[str, Any] = {"precision": precision}
    for stage, lines in found.items():
        pairs = [(line["loss"], other) for line, other in zip(lines, on_cpu[stage], strict=True)]
        last = {
            key: value for key, value in lines[-1].items() if key.startswith(("time_", "mfu", "data_wait", "step_s"))
        }
        apart = [abs(own - other) / abs(other) for own, other in pairs]
        result[stage] = {"losses and the CPU's": pairs, "most apart": max(apart), "last step": last}
    return result


def waits(options: argparse.Namespace) -> dict[str, Any]:
    """How often a step of the real trainer makes the host wait for the device, by place in the code."""
    import warnings

    import torch
    from host_waits import HostWaits
    from transformers import TrainerCallback

    from visper.training import run_stage

    counter, steps, on_gpu = HostWaits(), 6, device_of(options) == "cuda"
    kept: dict[str, int] = {}

    class Steady(TrainerCallback):
        """Counts from the third step on, checkpoints left out."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """The third step is the first that counts."""
            if state.global_step == 2:
                counter.places.clear()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """The last step's checkpoint comes later."""
            kept.clear()  # also of what was counted before the third step
            kept.update(counter.places)

    def shown(message: Any, category: Any, filename: str, lineno: int, *_: Any, **__: Any) -> None:
        if "synchroniz" in str(message):
            counter.add(Path(filename).name)

    found: dict[str, Any] = {
        "how": "torch.cuda.set_sync_debug_mode" if on_gpu else "operations that would wait on a GPU"
    }
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        for stage, run in quickstart_runs(
            Path(name), options, "bfloat16" if on_gpu else "float32", steps, "own"
        ).items():
            kept.clear()
            data = run.data.model_copy(update={"workers": 1})
            logging = run.logging.model_copy(update={"every": 100, "save_every": 100})
            run = run.model_copy(update={"data": data, "logging": logging})
            if on_gpu:
                warnings.simplefilter("always")
                warnings.showwarning = shown
                torch.cuda.set_sync_debug_mode("warn")
                run_stage(run, callbacks=[Steady()])
                torch.cuda.set_sync_debug_mode("default")
            else:
                with counter.counted():
                    run_stage(run, callbacks=[Steady()])
            places = dict(sorted(kept.items(), key=lambda place: -place[1]))
            found[stage] = {"a step": sum(kept.values()) / (steps - 2), "places": places}
    return found


def resume(options: argparse.Namespace) -> dict[str, Any]:
    """A run that is killed after its checkpoint and resumed, beside one that is not."""
    from visper.config import save_run
    from visper.training import run_stage

    steps = 4 if options.tiny else 20
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        precision = "float32" if device_of(options) == "cpu" else "bfloat16"
        whole, cut = (quickstart_runs(folder, options, precision, steps, which)["pt"] for which in ("one", "two"))
        run_stage(whole)
        save_run(cut, folder / "run.yaml")
        command = [sys.executable, "-m", "visper", "train", str(folder / "run.yaml")]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as first:
            checkpoint = Path(cut.output) / "checkpoints" / f"checkpoint-{steps // 2}" / "manifest.json"
            while not checkpoint.exists() and first.poll() is None:
                time.sleep(0.02)
            first.kill()
        killed = len(logged(cut.output))
        subprocess.run([*command, "--resume"], check=True, stdout=subprocess.DEVNULL)
        pairs = [(a["loss"], b["loss"]) for a, b in zip(logged(whole.output), logged(cut.output), strict=True)]
    apart = max(abs(one - other) / abs(one) for one, other in pairs)
    assert apart < 0.02, f"the resumed run's losses differ by {apart:.2%}: {pairs}"
    return {"killed after step": killed, "most apart": apart, "losses": pairs}


def setting_of(options: argparse.Namespace, **changes: Any) -> Any:
    """The step's setting: Llama-3-8B's geometry, or the tiny one."""
    import torch
    from gpu_steps import Setting
    from pretraining_step import GEOMETRIES

    from visper.common.gpus import peak_of

    device = device_of(options)
    geometry = GEOMETRIES["tiny" if device == "cpu" else "llama3-8b"]
    size, steps = (2, 1) if device == "cpu" else (options.micro_batch, 5)
    return Setting(geometry, size, steps, device, peak=peak_of(torch.device(device)), **changes)


def cases(options: argparse.Namespace, table: dict[str, Callable[[], dict[str, Any]]]) -> dict[str, Any]:
    """Each case with its peak memory; one that fails does not stop the next."""
    import gc

    import torch
    from pretraining_step import peak_gib

    found: dict[str, Any] = {}
    device = device_of(options)
    for name, case in table.items():
        torch.manual_seed(0)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            found[name] = case() | {"peak_gib": peak_gib(device)}
        except Exception:  # noqa: BLE001  written down; the part fails at its end
            found[name] = {"failed": traceback.format_exc()[-3000:]}
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        write(options.out, found)
    return found


def pt(options: argparse.Namespace) -> dict[str, Any]:
    """Pre-training with stored targets and with live teachers of published size; the planned peak beside it."""
    from gpu_steps import pre_training

    table: dict[str, Callable[[], dict[str, Any]]] = {
        f"stored targets, recomputed {share}": lambda share=share: pre_training(  # type: ignore[misc]
            setting_of(options, recomputed=share), live=False
        )
        for share in (1.0, 0.5, 0.0)
    }
    if not options.tiny:  # the published teachers fit no tiny target
        table["live teachers"] = lambda: pre_training(setting_of(options), live=True)
        table["planned"] = lambda: planned("llama3-8b-vit-l/pt", options)
    return cases(options, table)


def planned(recipe: str, options: argparse.Namespace) -> dict[str, Any]:
    """The peak that ``visper plan`` gives for rows of the recipe, which are longer than those that are timed."""
    from visper.config import load_run
    from visper.planning.memory import Machine
    from visper.planning.plan import plan

    run = load_run(recipe, [f"optimization.micro_batch={options.micro_batch}"])
    found = plan(run, Machine(1, 80e9, 989e12))
    return {"GB": {name: size / 1e9 for name, size in found.memory.parts.items()}, "row FLOPs": found.row_flops}


def ift(options: argparse.Namespace) -> dict[str, Any]:
    """Fine-tuning on as many layers as fit, packed and once padded."""
    from gpu_steps import fine_tuning

    layers = None if options.tiny else options.layers
    table: dict[str, Callable[[], dict[str, Any]]] = {
        f"packed, recomputed {share}": lambda share=share: fine_tuning(  # type: ignore[misc]
            setting_of(options, layers=layers, recomputed=share), packed=True
        )
        for share in (1.0, 0.5, 0.0)
    }
    table["padded"] = lambda: fine_tuning(setting_of(options, layers=layers), packed=False)
    return cases(options, table)


def lora(options: argparse.Namespace) -> dict[str, Any]:
    """Low-rank updates of the LLM at full depth."""
    from gpu_steps import fine_tuning

    if importlib.util.find_spec("peft") is None:
        return {"skipped": "peft is not installed: carry its wheel in wheels/"}
    return cases(
        options,
        {
            f"packed, recomputed {share}": lambda share=share: fine_tuning(  # type: ignore[misc]
                setting_of(options, recomputed=share), packed=True, lora=64
            )
            for share in (1.0, 0.5, 0.0)
        },
    )


def attention(options: argparse.Namespace) -> dict[str, Any]:
    """Packed fine-tuning under each attention, and with compiled decoder layers."""
    from gpu_steps import fine_tuning

    kinds = ["sdpa"] if options.tiny else ["sdpa", "flex_attention"]  # which has no backward pass on a CPU
    if importlib.util.find_spec("flash_attn") is not None:
        kinds.append("flash_attention_2")
    layers = None if options.tiny else options.layers
    table: dict[str, Callable[[], dict[str, Any]]] = {
        kind: lambda kind=kind: fine_tuning(  # type: ignore[misc]
            setting_of(options, layers=layers, attention=kind), packed=True
        )
        for kind in kinds
    }
    table["sdpa, compiled layers"] = lambda: fine_tuning(setting_of(options, layers=layers, compiled=True), packed=True)
    return cases(options, table)


PARTS: dict[str, Part] = {f.__name__: f for f in (tests, quickstart, waits, resume, ift, pt, lora, attention)}


def write(file: Path, content: dict[str, Any]) -> None:
    """JSON, in place."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def head() -> dict[str, Any]:
    """Command, date, versions and device."""
    import torch
    import transformers

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": name,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def run_part(options: argparse.Namespace) -> int:
    """One part in this process."""
    if device_of(options) == "cpu":
        import torch

        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    start = time.monotonic()
    try:
        found, failed = PARTS[options.part](options), False
        failed = any(isinstance(case, dict) and "failed" in case for case in found.values())
    except Exception:  # noqa: BLE001  written down; the next part goes on
        found, failed = {"failed": traceback.format_exc()}, True
        traceback.print_exc()
    if options.on_cpu:
        write(options.out, found)
    else:
        write(options.out, {**head(), "seconds": round(time.monotonic() - start, 1), "found": found})
    return int(failed)


def install_wheels() -> None:
    """Puts what is missing, such as pydantic, from ``wheels/`` into a folder that only this check reads."""
    if importlib.util.find_spec("pydantic") is None:
        target = Path(tempfile.gettempdir()) / "visper-gpu-check-packages"
        wheels = [str(file) for file in sorted(WHEELS.glob("*.whl"))]
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(target)]
        subprocess.run([*pip, *wheels], check=True)
        os.environ["PYTHONPATH"] = os.pathsep.join((str(target), os.environ.get("PYTHONPATH", "")))


def main() -> int:
    """Runs all parts, each in its process; prints a line for each."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="on the CPU, in a minute")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(BUDGETS))
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--layers", type=int, default=14, help="of the LLM in fine-tuning")
    parser.add_argument("--out", type=Path, default=RESULTS, help="a folder; with --part a file")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--on-cpu", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join((str(ROOT / "src"), os.environ.get("PYTHONPATH", "")))
    if options.part:
        return run_part(options)
    install_wheels()
    failures = 0
    for part in options.parts:
        file, start = options.out / f"{part}.json", time.monotonic()
        file.unlink(missing_ok=True)
        command = [sys.executable, __file__, "--part", part, "--out", str(file), "--layers", str(options.layers)]
        command += ["--micro-batch", str(options.micro_batch)] + ["--tiny"] * options.tiny
        try:
            code = subprocess.run(command, check=False, timeout=BUDGETS[part] * (5 if options.tiny else 1)).returncode
        except subprocess.TimeoutExpired:
            code = 1
            found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
            write(file, {**head(), "found": found, "failed": f"not done after {BUDGETS[part]} s"})
        failures += code != 0
        print(f"{part}: {'failed' if code else 'done'} after {time.monotonic() - start:.0f} s: {file}", flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(main())
