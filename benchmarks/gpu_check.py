"""Checks and times this library on one GPU, in one command of at most nine minutes.

    make wheels                                     # on a machine with a network; copy the folder wheels/ along
    python benchmarks/gpu_check.py                  # one 80 GB GPU: torch, transformers, accelerate, no network
    python benchmarks/gpu_check.py --tiny           # every path on the CPU, in minutes

Each part is a process with a time budget and writes ``OUT/PART.json`` when it is done. A part that fails or runs out of
time leaves its traceback there and does not stop the next. Parts that do not fit in the time are skipped, and a message
says so. At the end one line is printed per case, with the planner's peak beside the measured one. The exit code is the
number of failed parts.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_cases import device_of, ift, lora, plan, pt, summary, variants, write

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu_check"
WHEELS = ROOT / "wheels"
BUDGETS = {"tests": 40, "quickstart": 80, "pt": 115, "waits": 25, "resume": 45, "ift": 60, "lora": 45, "variants": 125}
"""Seconds of each part, in the order in which they run: the most important first."""
ALL = 535
"""Seconds of all parts together."""
PLANNING = "plan"
"""The part that needs no GPU. It runs in parallel to the others from the start."""
NEEDED = "accelerate filelock jinja2 PIL pyarrow pydantic requests rich scipy tokenizers torch torchvision transformers"
NEEDED += " typer xxhash yaml"
"""Packages that are imported, without ``datasets``, which training does not need."""
GPU_TESTS = ("tests/training/test_compilation.py", "tests/training/test_lora.py")
STEPS = 50
Part = Callable[[argparse.Namespace], dict[str, Any]]


def tests(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the tests that need a GPU; on a CPU they are collected and skipped."""
    if importlib.util.find_spec("pytest") is None:
        return {"skipped": "pytest is not installed: carry its wheel in wheels/"}
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", *GPU_TESTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 5):
        raise RuntimeError(done.stdout[-4000:] + done.stderr[-2000:])
    return {"said": done.stdout.splitlines()[-1]}


def quickstart_runs(folder: Path, options: argparse.Namespace, precision: str, steps: int, name: str) -> dict[str, Any]:
    """The runs of the quickstart's PT and IFT under ``folder/name``, in this precision."""
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
    """The lines of a run's log that have a loss."""
    lines = (Path(output) / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if "loss" in line]


def quickstart(options: argparse.Namespace) -> dict[str, Any]:
    """Trains PT and IFT with the real trainer, in bfloat16 on the GPU and in float32 on the host's CPU."""
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
    """Counts how often a step of the real trainer makes the host wait for the device, by place in the code."""
    import warnings

    import torch
    from host_waits import HostWaits
    from transformers import TrainerCallback

    from visper.training import run_stage

    counter, steps, on_gpu = HostWaits(), 6, device_of(options) == "cuda"
    kept: dict[str, int] = {}

    class Steady(TrainerCallback):
        """Counts from the third step on, without checkpoints."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Forgets the first two steps."""
            if state.global_step == 2:
                counter.places.clear()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Copies the counts now: the last step's checkpoint comes later."""
            kept.clear()  # removes what was counted before the third step
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
    """Compares a run that is killed after its checkpoint and resumed with one that is not."""
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


PARTS: dict[str, Part] = {f.__name__: f for f in (tests, quickstart, waits, resume, ift, pt, lora, variants, plan)}


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
    """Runs one part in this process."""
    if device_of(options) == "cpu":
        import torch

        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    else:  # parts that time steps do not join processes, which does this
        from visper.common.gpus import avoid_plans_by_shape

        avoid_plans_by_shape()
    start = time.monotonic()
    try:
        found, failed = PARTS[options.part](options), False
        failed = any(isinstance(case, dict) and "failed" in case for case in found.values())
    except Exception:  # noqa: BLE001  recorded; the next part still runs
        found, failed = {"failed": traceback.format_exc()}, True
        traceback.print_exc()
    if options.on_cpu:
        write(options.out, found)
    else:
        write(options.out, {**head(), "seconds": round(time.monotonic() - start, 1), "found": found})
    return int(failed)


def install_wheels() -> None:
    """Installs missing packages from ``wheels/`` into a folder that only this check uses."""

    def installed(wheel: Path) -> bool:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return bool(importlib.metadata.version(wheel.name.split("-")[0]))
        return False

    wheels = [str(wheel) for wheel in sorted(WHEELS.glob("*.whl")) if not installed(wheel)]
    if wheels:
        target = Path(tempfile.gettempdir()) / "visper-gpu-check-packages"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(target)]
        subprocess.run([*pip, "--upgrade", *wheels], check=True)
        sys.path.insert(0, str(target))
        os.environ["PYTHONPATH"] = os.pathsep.join((str(target), os.environ.get("PYTHONPATH", "")))
    importlib.invalidate_caches()
    missing = [name for name in NEEDED.split() if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"not installed, and not in {WHEELS}: {', '.join(missing)}: copy their wheels there")


def started(options: argparse.Namespace, part: str, seconds: float) -> subprocess.Popen[bytes]:
    """Starts a part in a process that has this many seconds."""
    file = options.out / f"{part}.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--part", part, "--out", str(file), "--layers", str(options.layers)]
    command += ["--micro-batch", str(options.micro_batch), "--seconds", str(seconds)] + ["--tiny"] * options.tiny
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if part == PLANNING else {}
    return subprocess.Popen(command, env={**os.environ, **hidden}, start_new_session=True)


def ended(options: argparse.Namespace, part: str, process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Waits for a part at most this many seconds, then kills it and its children. Returns whether it succeeded."""
    file = options.out / f"{part}.json"
    try:
        return process.wait(seconds) == 0
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        found = json.loads(file.read_text(encoding="utf-8"))["found"] if file.exists() else {}
        write(file, {**head(), "found": found, "failed": f"not done after {seconds:.0f} s"})
        return False


def run_parts(options: argparse.Namespace) -> int:
    """Runs all parts, each in its process and the planner in parallel; prints one line per part and per case."""
    slower = 10 if options.tiny else 1  # two shared CPU cores
    began, failures = time.monotonic(), 0

    def left() -> float:
        return ALL * slower - (time.monotonic() - began)

    planner = started(options, PLANNING, left()) if PLANNING in options.parts else None
    for part in options.parts:
        if part == PLANNING:
            continue
        start, seconds = time.monotonic(), min(BUDGETS[part] * slower, left())
        if seconds < BUDGETS[part] / 2:
            print(f"{part}: skipped, {left():.0f} s are left of {ALL}", flush=True)
            write(options.out / f"{part}.json", {**head(), "found": {"skipped": f"{left():.0f} s were left"}})
            continue
        well = ended(options, part, started(options, part, seconds), seconds)
        failures += not well
        print(f"{part}: {'done' if well else 'failed'} after {time.monotonic() - start:.0f} s", flush=True)
    if planner is not None:
        failures += not ended(options, PLANNING, planner, max(left(), 1.0))
    print("\n".join(summary(options.out, options.parts)), flush=True)
    return failures


def main() -> int:
    """Runs all parts, or only one, in this process."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small models, on the CPU")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*BUDGETS, PLANNING])
    parser.add_argument("--micro-batch", type=int, default=0, help="default: 16; 2 with --tiny")
    parser.add_argument("--layers", type=int, default=8, help="layers of the LLM in fine-tuning")
    parser.add_argument("--out", type=Path, default=RESULTS, help="a folder; with --part, a file")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=float("inf"), help=argparse.SUPPRESS)
    parser.add_argument("--on-cpu", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.micro_batch = options.micro_batch or (2 if options.tiny else 16)
    os.environ["PYTHONPATH"] = os.pathsep.join((str(ROOT / "src"), os.environ.get("PYTHONPATH", "")))
    if options.part:
        return run_part(options)
    install_wheels()
    import torch

    if not options.tiny and not torch.cuda.is_available():
        sys.exit("torch sees no GPU: run it with --tiny")
    return run_parts(options)


if __name__ == "__main__":
    sys.exit(main())
