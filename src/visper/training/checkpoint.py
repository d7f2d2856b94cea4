"""Checkpoints: what they hold, how they become complete, how they are read.

A checkpoint holds the trainable parameters with the buffers of their modules, the optimizer state, the schedule, the
random states and the order of the rows; frozen weights are loaded from the stage's starting point. Tensors are stored
in ``STATE`` by parameter name, in shards that record their offsets, so that any number of processes can resume under
``ddp`` and ``fsdp``; DeepSpeed writes its own format. A checkpoint is written under ``STAGING``, its manifest last, and
moved to its place once it is on disk (``checkpoint_writer``). Checkpoints that do not match their manifest are renamed,
and the newest one that does is resumed.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import DTensor
from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from visper.common.console import Console, announce
from visper.common.errors import ConfigError, TrainingError
from visper.common.files import flush_names
from visper.common.manifest import find_damage, write_manifest

FOLDER = "checkpoints"
STAGING = ".staging"
DAMAGED = ".damaged"
STATE = "state"
"""Folder of a checkpoint's tensors: safetensors, at least one file from each process that had something to write."""
SCHEDULER_FILE = "scheduler.pt"


def checkpoints(output: Path) -> list[Path]:
    """The checkpoints in a run's output folder, oldest first, without those renamed as damaged."""
    found = [
        (int(m.group(1)), p) for p in (output / FOLDER).glob("*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))
    ]
    return [path for _, path in sorted(found)]


def checkpoint_name(step: int) -> str:
    """The folder name of a step's checkpoint."""
    return f"{PREFIX_CHECKPOINT_DIR}-{step}"


def is_last(checkpoint: Path) -> bool:
    """Whether ``checkpoint`` is of the run's last step."""
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    return bool(state.global_step >= state.max_steps)


def complete(output: Path, name: str, keep: int, best: str | None = None) -> None:
    """Moves the checkpoint ``name`` from staging to its place, then removes all but the newest ``keep`` and ``best``.

    Raises:
        TrainingError: the files on disk do not match the manifest; older checkpoints are kept.
    """
    staged, place = output / FOLDER / STAGING / name, output / FOLDER / name
    write_manifest(staged)
    if place.exists():
        shutil.rmtree(place)
    staged.rename(place)
    flush_names(place.parent)
    damage = find_damage(place)
    if damage is not None:
        raise TrainingError(f"checkpoint '{place}' is damaged right after writing ({damage}): check the disk")
    for old in checkpoints(output)[:-keep]:
        if old.name != best:
            shutil.rmtree(old)


def newest_undamaged(output: Path, console: Console) -> Path | None:
    """The newest checkpoint that matches its manifest, or None if there are none. Renames damaged ones and logs it.

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
            f"every checkpoint in '{output / FOLDER}' is damaged ({', '.join(damaged)}): restore one from a backup, or "
            "remove the folder to train from step 0"
        )
    return None


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that only a checkpoint can restore, by name.

    These are the trainable parameters, the persistent buffers of modules that have some (batch statistics) and of all
    heads, and the frozen heads, whose weights are random.
    """
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad or n.startswith("objective.")}
    saved = model.state_dict().keys()
    buffers = {
        f"{place}.{name}": buffer
        for place, module in model.named_modules()
        if place.startswith("objective.") or any(p.requires_grad for p in module.parameters(recurse=False))
        for name, buffer in module.named_buffers(recurse=False)
        if f"{place}.{name}" in saved
    }
    return {**parameters, **buffers}


def require_finite(model: nn.Module, accelerator: Accelerator) -> None:
    """Checks that the weights to be saved are finite. Every process must call.

    Raises:
        TrainingError: some are NaN or infinite; the message names the first parameter.
    """
    local = {name: p.to_local() if isinstance(p, DTensor) else p for name, p in trainable_state(model).items()}
    damaged = [name for name, p in local.items() if p.is_floating_point() and not bool(torch.isfinite(p).all())]
    count = accelerator.reduce(torch.tensor(len(damaged), device=accelerator.device), "sum")
    if int(count):
        first = f", the first on this process is '{damaged[0]}'" if damaged else ""
        raise TrainingError(
            f"{int(count)} trainable parameters are NaN or infinite{first}: nothing was saved, and the last good "
            "checkpoint is kept. Lower the learning rate or train in float32, then add --resume"
        )


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The tensors of model and optimizer that a checkpoint holds, by parameter name; sharded where the model is."""
    return {"weights": trainable_state(model), "optimizer": get_optimizer_state_dict(model, optimizer)["state"]}


@torch.no_grad()
def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Reads the weights of ``checkpoint`` into ``model``, each process its own shards. Every process must call.

    Raises:
        ConfigError: the checkpoint belongs to another model or stage.
    """
    own, saved = trainable_state(model), _saved(checkpoint, "weights.")
    different = sorted(saved.keys() ^ own.keys())
    different += [name for name in sorted(saved.keys() & own.keys()) if saved[name] != own[name].shape]
    if different:
        raise ConfigError(
            f"checkpoint '{checkpoint}' belongs to another model or stage: {len(different)} parameters differ, the "
            f"first are {different[:3]}. Resume with the run that wrote it"
        )
    _load({"weights": own}, checkpoint)


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Path) -> None:
    """Reads the optimizer's state, each process its own shards. Every process must call.

    A parameter that had no gradient before the checkpoint has no saved state, and starts without state again.
    """
    state = get_optimizer_state_dict(model, optimizer)
    own: Any = state["state"]
    begun = {name.rpartition(".")[0] for name in _saved(checkpoint, "optimizer.")}
    _load({"optimizer": {name: values for name, values in own.items() if name in begun}}, checkpoint)
    set_optimizer_state_dict(model, optimizer, state)
    for name, parameter in model.named_parameters():
        if name in own and name not in begun:
            del optimizer.state[parameter]  # torch initialized it, one step ahead


def _saved(checkpoint: Path, prefix: str) -> dict[str, torch.Size]:
    """Sizes of the saved tensors whose names begin with ``prefix``, by name without the prefix."""
    if not (checkpoint / STATE).is_dir():
        return {}
    found: dict[str, Any] = HuggingFaceStorageReader(str(checkpoint / STATE)).read_metadata().state_dict_metadata
    return {name.removeprefix(prefix): entry.size for name, entry in found.items() if name.startswith(prefix)}


def _load(state: dict[str, Any], checkpoint: Path) -> None:
    """Reads a checkpoint into the tensors of ``state``, whatever number of processes wrote it."""
    reader = HuggingFaceStorageReader(str(checkpoint / STATE))
    dcp.load(state, storage_reader=reader, no_dist=not dist.is_initialized())


def save_scheduler(scheduler: Any, folder: Path) -> None:
    """Writes the state of the learning rate schedule."""
    torch.save(scheduler.state_dict(), folder / SCHEDULER_FILE)


def load_scheduler(scheduler: Any, optimizer: torch.optim.Optimizer, checkpoint: Path) -> None:
    """Reads the state of the learning rate schedule, and sets the optimizer's learning rates to its current ones."""
    scheduler.load_state_dict(torch.load(checkpoint / SCHEDULER_FILE, weights_only=True))
    for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = rate
