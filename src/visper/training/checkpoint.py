"""Checkpoints: what is saved, how a checkpoint becomes complete, how it is read.

Saved are the trainable parameters with the buffers of their modules, the optimizer's state, the schedule, the random
states and the order of the rows; frozen weights come from where the stage started. Tensors lie in ``STATE`` by
parameter name, in shards that say which part they are, so that any number of processes under any engine can resume;
only DeepSpeed writes its own. A checkpoint is written under ``STAGING``, its manifest last, and moved to its place once
it is on the disk (``checkpoint_writer``). One that no longer matches its manifest is set aside, and the newest that
does is resumed.
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

from visper.common.console import Console, announce
from visper.common.errors import ConfigError, TrainingError
from visper.common.files import flush_names
from visper.common.manifest import find_damage, write_manifest

FOLDER = "checkpoints"
STAGING = ".staging"
DAMAGED = ".damaged"
STATE = "state"
"""Folder of a checkpoint's tensors: safetensors, at least one file of each process that had something to write."""
SCHEDULER_FILE = "scheduler.pt"


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


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What a checkpoint holds of both, by parameter name: tensors, sharded where the model is."""
    return {"weights": trainable_state(model), "optimizer": get_optimizer_state_dict(model, optimizer)["state"]}


@torch.no_grad()
def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Reads the weights of ``checkpoint`` into ``model``, each process its own shards. Every process must call.

    Raises:
        ConfigError: it is of another model or stage.
    """
    own, saved = trainable_state(model), _saved(checkpoint, "weights.")
    different = sorted(saved.keys() ^ own.keys())
    different += [name for name in sorted(saved.keys() & own.keys()) if saved[name] != own[name].shape]
    if different:
        raise ConfigError(
            f"checkpoint '{checkpoint}' is of another model or stage: {len(different)} parameters differ, "
            f"first {different[:3]}. Resume with the run that wrote it"
        )
    _load({"weights": own}, checkpoint)


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Path) -> None:
    """Reads the optimizer's state, each process its own shards. Every process must call.

    A parameter that had no gradient before the checkpoint has no state there, and begins without one again.
    """
    state = get_optimizer_state_dict(model, optimizer)
    own: Any = state["state"]
    begun = {name.rpartition(".")[0] for name in _saved(checkpoint, "optimizer.")}
    _load({"optimizer": {name: values for name, values in own.items() if name in begun}}, checkpoint)
    set_optimizer_state_dict(model, optimizer, state)
    for name, parameter in model.named_parameters():
        if name in own and name not in begun:
            del optimizer.state[parameter]  # torch has made one up, a step ahead


def _saved(checkpoint: Path, prefix: str) -> dict[str, torch.Size]:
    """Sizes of the saved tensors whose names begin with ``prefix``, which is cut off."""
    if not (checkpoint / STATE).is_dir():
        return {}
    found: dict[str, Any] = HuggingFaceStorageReader(str(checkpoint / STATE)).read_metadata().state_dict_metadata
    return {name.removeprefix(prefix): entry.size for name, entry in found.items() if name.startswith(prefix)}


def _load(state: dict[str, Any], checkpoint: Path) -> None:
    """Fills the tensors of ``state``, whatever number of processes wrote them."""
    reader = HuggingFaceStorageReader(str(checkpoint / STATE))
    dcp.load(state, storage_reader=reader, no_dist=not dist.is_initialized())


def save_scheduler(scheduler: Any, folder: Path) -> None:
    """Writes the state of the learning rate's schedule."""
    torch.save(scheduler.state_dict(), folder / SCHEDULER_FILE)


def load_scheduler(scheduler: Any, optimizer: torch.optim.Optimizer, checkpoint: Path) -> None:
    """Reads the state of the learning rate's schedule, and gives the optimizer the rates it stands at."""
    scheduler.load_state_dict(torch.load(checkpoint / SCHEDULER_FILE, weights_only=True))
    for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = rate
