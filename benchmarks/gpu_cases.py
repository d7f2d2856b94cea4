"""The parts of ``gpu_check.py`` that time steps with Llama-3-8B's geometry, and the planner's estimates for them."""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

Case = Callable[[int], dict[str, Any]]
"""A micro-batch -> measurements."""
SHARES = (1.0, 0.5, 0.0)


def write(file: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def device_of(options: argparse.Namespace) -> str:
    """``cuda``, or ``cpu`` if the check is tiny or there is no GPU."""
    import torch

    return "cuda" if torch.cuda.is_available() and not options.tiny else "cpu"


def setting_of(options: argparse.Namespace, micro_batch: int, device: str | None = None, **changes: Any) -> Any:
    """The settings of a step: Llama-3-8B's geometry, or the tiny one."""
    import torch
    from gpu_steps import Setting
    from pretraining_step import GEOMETRIES

    from visper.common.gpus import peak_of

    device = device or device_of(options)
    geometry, steps = GEOMETRIES["tiny" if options.tiny else "llama3-8b"], 1 if options.tiny else 3
    return Setting(
        geometry, micro_batch, steps, device, not options.tiny, peak=peak_of(torch.device(device)), **changes
    )


def cases(options: argparse.Namespace, table: dict[str, Case]) -> dict[str, Any]:
    """Runs each case and records its peak memory; results are written after each.

    A failed case does not stop the next. A case that runs out of memory runs again with half the micro-batch. A case is
    skipped if it would exceed the part's time, judging by the longest so far.
    """
    found: dict[str, Any] = {}
    began, longest = time.monotonic(), 0.0
    for name, case in table.items():
        start = time.monotonic()
        if start - began + longest > options.seconds:
            found[name] = {
                "skipped": f"{start - began:.0f} of {options.seconds:.0f} s are gone, one took {longest:.0f}"
            }
        else:
            found[name] = measured(options, case)
            longest = max(longest, time.monotonic() - start)
        write(options.out, {"found": found})
    return found


def measured(options: argparse.Namespace, case: Case) -> dict[str, Any]:
    """The measurements of a case at the larger of two micro-batches that fits."""
    import torch
    from pretraining_step import peak_gib

    device, too_large = device_of(options), []
    found: dict[str, Any] = {}
    for size in (options.micro_batch, options.micro_batch // 2):
        torch.manual_seed(0)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            found = {"micro_batch": size, **case(size), "peak_gib": peak_gib(device)}
        except torch.OutOfMemoryError as error:
            found = {"out of memory": str(error).splitlines()[0]}
            too_large.append(size)
        except Exception:  # noqa: BLE001  written down; the part fails at its end
            found = {"micro_batch": size, "failed": traceback.format_exc()[-3000:]}
        gc.collect()  # after the error, whose frames hold tensors, is gone
        if device == "cuda":
            torch.cuda.empty_cache()
        if "out of memory" not in found:
            break
    return {**found, "did not fit": too_large} if too_large else found


def pt(options: argparse.Namespace) -> dict[str, Any]:
    """Times pre-training with stored targets, then with live teachers of published size."""
    from gpu_steps import pre_training

    def case(live: bool, share: float) -> Case:
        return lambda size: pre_training(setting_of(options, size, recomputed=share), live)

    kinds = {"stored targets": False, "live teachers": True}
    if options.tiny:  # the published teachers fit no tiny target
        del kinds["live teachers"]
    return cases(
        options, {f"{kind}, recomputed {share}": case(live, share) for kind, live in kinds.items() for share in SHARES}
    )


def ift(options: argparse.Namespace) -> dict[str, Any]:
    """Times fine-tuning with as many layers as fit, packed and once padded."""
    from gpu_steps import fine_tuning

    def case(packed: bool, share: float) -> Case:
        return lambda size: fine_tuning(setting_of(options, size, layers=layers_of(options), recomputed=share), packed)

    return cases(
        options, {**{f"packed, recomputed {share}": case(True, share) for share in SHARES}, "padded": case(False, 1.0)}
    )


def layers_of(options: argparse.Namespace) -> int | None:
    """The number of decoder layers in fine-tuning."""
    return None if options.tiny else int(options.layers)


def lora(options: argparse.Namespace) -> dict[str, Any]:
    """Times low-rank updates of the LLM at full depth."""
    from gpu_steps import fine_tuning

    if importlib.util.find_spec("peft") is None:
        return {"skipped": "peft is not installed: carry its wheel in wheels/"}

    def case(share: float) -> Case:
        return lambda size: fine_tuning(setting_of(options, size, recomputed=share), packed=True, lora=64)

    return cases(options, {f"packed, recomputed {share}": case(share) for share in SHARES})


def variants(options: argparse.Namespace) -> dict[str, Any]:
    """Times fine-tuning with each attention, compiled or not, and with fused losses; and pre-training, compiled."""
    import torch.nn.functional as F
    from gpu_steps import fine_tuning, pre_training

    def case(packed: bool = True, **changes: Any) -> Case:
        return lambda size: fine_tuning(setting_of(options, size, layers=layers_of(options), **changes), packed)

    on_gpu = device_of(options) == "cuda"
    table = {"packed, sdpa": case()}
    if on_gpu:  # flex attention has no backward pass on a CPU
        table["packed, sdpa, cuDNN allowed"] = with_cudnn(case())
        table["packed, flex_attention"] = case(attention="flex_attention")
        table["packed, flex_attention, compiled"] = case(attention="flex_attention", compiled=True)
    table["padded, sdpa, compiled"] = case(packed=False, compiled=True)  # not compiled: part ift
    table["PT, stored targets, compiled"] = lambda size: pre_training(  # not compiled: part pt
        setting_of(options, size, compiled=True), live=False
    )
    if on_gpu and importlib.util.find_spec("liger_kernel") is not None:
        table["packed, sdpa, fused loss (Liger)"] = case(fused="liger")
    if hasattr(F, "linear_cross_entropy"):
        table["packed, sdpa, fused loss (torch)"] = case(fused="linear_cross_entropy")
    if on_gpu and importlib.util.find_spec("flash_attn") is not None:
        table["packed, flash_attention_2"] = case(attention="flash_attention_2")
    return cases(options, table)


def with_cudnn(case: Case) -> Case:
    """The case with cuDNN among torch's kernels for attention, which training leaves out (``avoid_plans_by_shape``)."""
    import torch

    from visper.common.gpus import avoid_plans_by_shape

    def run(size: int) -> dict[str, Any]:
        torch.backends.cuda.enable_cudnn_sdp(True)
        try:
            return case(size)
        finally:
            avoid_plans_by_shape()

    return run


def plan(options: argparse.Namespace) -> dict[str, Any]:
    """The planner's peaks for the cases of PT, IFT and LoRA, in bytes."""
    from gpu_plan import planned_fine_tuning, planned_pre_training

    found: dict[str, Any] = {"pt": {}, "ift": {}, "lora": {}}

    def of(share: float, **changes: Any) -> Any:
        return setting_of(options, options.micro_batch, "meta", recomputed=share, **changes)

    for share in SHARES:
        packed = f"packed, recomputed {share}"
        found["pt"][f"stored targets, recomputed {share}"] = planned_pre_training(of(share), live=False)
        found["ift"][packed] = planned_fine_tuning(of(share, layers=layers_of(options)), packed=True)
        if importlib.util.find_spec("peft") is not None:
            found["lora"][packed] = planned_fine_tuning(of(share), packed=True, lora=64)
        if not options.tiny:
            found["pt"][f"live teachers, recomputed {share}"] = planned_pre_training(of(share), live=True)
        write(options.out, {"found": found})
    return found


def summary(folder: Path, parts: list[str]) -> list[str]:
    """One line per case of these parts: seconds, MFU, share of waiting for data, peak and planned peak."""
    planned = _read(folder / "plan.json")
    lines = []
    for part in parts:
        found = _read(folder / f"{part}.json")
        own = {"": found} if found.keys() & {"failed", "skipped", "most apart"} else found
        lines += [
            f"{part}: {name}: {_said(case, planned.get(part, {}).get(name))}"
            for name, case in own.items()
            if isinstance(case, dict) and part != "plan"
        ]
    return lines


def _read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["found"] if file.is_file() else {}
    return found


def _said(case: dict[str, Any], planned: dict[str, float] | None) -> str:
    for word in ("failed", "out of memory", "skipped"):
        if word in case:
            return f"{word}: {str(case[word]).splitlines()[-1]}"
    said = []
    if "seconds" in case:
        said.append(f"{case['seconds']['step']:.3f} s per step of {case['micro_batch']} rows")
    if case.get("mfu"):
        said.append(f"MFU {case['mfu']:.1%}")
    waited = case.get("data_wait", case.get("last step", {}).get("data_wait"))
    if waited is not None:
        said.append(f"{waited:.1%} of the step waits for data")
    if "most apart" in case:
        said.append(f"losses at most {case['most apart']:.2g} apart")
    if "a step" in case:
        said.append(f"{case['a step']} waits for the device a step")
    if "peak_gib" in case:
        said.append(f"peak {case['peak_gib']:.2f} GiB")
    if planned is not None and not case.get("did not fit"):
        said.append(f"planned {planned['peak'] / 2**30:.2f} GiB")
    return ", ".join(said)
