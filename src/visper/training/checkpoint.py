"""Checkpoints: what is saved, how a checkpoint becomes complete, how it is read.

Saved are the trainable parameters with the buffers of their modules, the optimizer's state, the schedule, the random
states and the order of the rows; frozen weights come from where the stage started. All of it is unsharded and by
parameter name, so that another number of processes can resume; only DeepSpeed writes its own. A checkpoint is written
under ``STAGING``, its manifest last, and moved to its place once it is on the disk. One that no longer matches its
manifest is set aside, and the newest that does is resumed.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from transformers import TrainerState

from visper.common.console import Console, announce
from visper.common.errors import ConfigError, TrainingError
from visper.common.files import flush_names
from visper.common.manifest import find_damage, write_manifest
from visper.training.parallel.fsdp import put, whole

FOLDER = "checkpoints"
STAGING = ".staging"
DAMAGED = ".damaged"
WEIGHTS = "model.safetensors"
OPTIMIZER_FILE, SCHEDULER_FILE = "optimizer.pt", "scheduler.pt"
UNSHARDED = StateDictOptions(full_state_dict=True, cpu_offload=True)


def checkpoints(output: Path) -> list[Path]:
    """The checkpoints in a run's output folder, oldest first, without those set aside as damaged."""
    found = [
        (int(m.group(1)), p) for p in (output / FOLDER).glob("*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))
    ]
    return [path for _, path in sorted(found)]


def is_last(checkpoint: Path) -> bool:
    """Whether no step is left to train after ``checkpoint``."""
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    return bool(state.global_step >= state.max_steps)


def complete(output: Path, name: str, keep: int, best: str | None = None) -> None:
    """Moves the checkpoint ``name`` from staging to its place, then removes all but the newest ``keep`` and ``best``.

    Raises:
        TrainingError: it does not read as it was written; older ones stay.
    """
    staged, place = output / FOLDER / STAGING / name, output / FOLDER / name
    write_manifest(staged)
    if place.exists():
        shutil.rmtree(place)
    staged.rename(place)
    flush_names(place.parent)
    damage = find_damage(place)
    if damage is not None:
        raise TrainingError(f"checkpoint '{place}' is damaged right after it was written ({damage}): check the disk")
    for old in checkpoints(output)[:-keep]:
        if old.name != best:
            shutil.rmtree(old)


def newest_undamaged(output: Path, console: Console) -> Path | None:
    """The newest checkpoint that matches its manifest; None: none was completed. Sets damaged ones aside, and says so.

    Raises:
        ConfigError: all are damaged.
    """
    for found in reversed(checkpoints(output)):
        damage = find_damage(found)
        if damage is None:
            return found
        aside = found.with_name(f"{found.name}{DAMAGED}")
        shutil.rmtree(aside, ignore_errors=True)
        found.rename(aside)
        announce(console, "warning", f"checkpoint '{found}' is damaged ({damage}): renamed to '{aside.name}'")
    damaged = sorted(path.name for path in (output / FOLDER).glob(f"*{DAMAGED}"))
    if damaged:
        raise ConfigError(
            f"no checkpoint in '{output / FOLDER}' is undamaged, there are {', '.join(damaged)}: put one back from a "
            "copy, or remove the folder to train from step 0"
        )
    return None


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """What no folder elsewhere holds, by name.

    Trainable parameters, the saved buffers of modules that have some (batch statistics), and frozen heads, whose
    weights are random.
    """
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad or n.startswith("objective.")}
    saved = model.state_dict().keys()
    buffers = {
        f"{place}.{name}": buffer
        for place, module in model.named_modules()
        if any(p.requires_grad for p in module.parameters(recurse=False))
        for name, buffer in module.named_buffers(recurse=False)
        if f"{place}.{name}" in saved
    }
    return {**parameters, **buffers}


def require_finite(model: nn.Module, accelerator: Accelerator) -> None:
    """Refuses to save weights that are NaN or infinite: they would replace good ones. Every process must call.

    Raises:
        TrainingError: the message names the first parameter.
    """
    local = {name: p.to_local() if isinstance(p, DTensor) else p for name, p in trainable_state(model).items()}
    damaged = [name for name, p in local.items() if p.is_floating_point() and not bool(torch.isfinite(p).all())]
    count = accelerator.reduce(torch.tensor(len(damaged), device=accelerator.device), "sum")
    if int(count):
        first = f", the first here '{damaged[0]}'" if damaged else ""
        raise TrainingError(
            f"{int(count)} trainable parameters are NaN or infinite{first}: nothing was saved over the last good "
            "checkpoint. Lower the learning rate or train in float32, then add --resume"
        )


def save_weights(model: nn.Module, folder: Path, write: bool) -> None:
    """Writes ``trainable_state``. Every process must call; the one that is to ``write`` does."""
    weights = whole(trainable_state(model).items(), keep=write)
    if write:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Reads the weights of ``checkpoint`` into ``model``.

    Raises:
        ConfigError: it is of another model or stage.
    """
    saved, own = load_file(checkpoint / WEIGHTS), trainable_state(model)
    different = sorted(saved.keys() ^ own.keys())
    different += [name for name in sorted(saved.keys() & own.keys()) if saved[name].shape != own[name].shape]
    if different:
        raise ConfigError(
            f"checkpoint '{checkpoint}' is of another model or stage: {len(different)} parameters differ, "
            f"first {different[:3]}. Resume with the run that wrote it"
        )
    for name, tensor in own.items():
        put(tensor, saved[name])


def save_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, write: bool) -> None:
    """Writes the optimizer's state. Every process must call; the one that is to ``write`` does."""
    state = get_optimizer_state_dict(model, optimizer, options=UNSHARDED)
    if write:
        torch.save(state, folder / OPTIMIZER_FILE)


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Path) -> None:
    """Reads the optimizer's state."""
    state = torch.load(checkpoint / OPTIMIZER_FILE, map_location="cpu", weights_only=True)
    set_optimizer_state_dict(model, optimizer, state, options=UNSHARDED)


def save_scheduler(scheduler: Any, folder: Path) -> None:
    """Writes the state of the learning rate's schedule."""
    torch.save(scheduler.state_dict(), folder / SCHEDULER_FILE)


def load_scheduler(scheduler: Any, checkpoint: Path) -> None:
    """Reads the state of the learning rate's schedule."""
    scheduler.load_state_dict(torch.load(checkpoint / SCHEDULER_FILE, weights_only=True))
