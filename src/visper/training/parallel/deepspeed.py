"""DeepSpeed ZeRO through transformers and accelerate: settings and checkpoints.

ZeRO-2 shards the gradients and the optimizer state of trainable parameters; ZeRO-3 shards all weights too, frozen ones
included. Checkpoints are DeepSpeed's own, so only the same engine with the same number of processes can resume them.
"""

from __future__ import annotations

import importlib.util
import json
import os
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visper.common.errors import ConfigError
from visper.config import Engine, Launch, Run

if TYPE_CHECKING:
    from accelerate import PartialState

    from visper.training.module import TrainingModel

STAGES = {Engine.ZERO2: 2, Engine.ZERO3: 3}
WRITER = "deepspeed.json"
"""File in checkpoints written by DeepSpeed, with their engine and number of processes; other checkpoints lack it."""


def require_deepspeed(launch: Launch) -> None:
    """Raises ConfigError if the engine needs DeepSpeed and it is not installed."""
    if launch.engine in STAGES and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            f"launch.engine={launch.engine} needs DeepSpeed, which is not installed: "
            "DS_BUILD_OPS=0 pip install 'visper-lm[deepspeed]', or set launch.engine=fsdp"
        )


def uses_zero(launch: Launch) -> bool:
    """Whether DeepSpeed shards this run. It is not used with a single process, for which there is nothing to shard.

    Raises:
        ConfigError: DeepSpeed is not installed; the message names the extra to install.
    """
    if launch.engine not in STAGES or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return False
    require_deepspeed(launch)
    return True


def zero_state(timeout: timedelta) -> PartialState:
    """Process state for DeepSpeed. accelerate rejects DeepSpeed on CPU, so request the gloo backend with cpu=False."""
    import torch
    from accelerate import PartialState

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"  # read by PartialState; `accelerate launch` sets it too
    return PartialState(cpu=False, backend=None if torch.cuda.is_available() else "gloo", timeout=timeout)


def zero_settings(run: Run) -> dict[str, Any]:
    """DeepSpeed's configuration; transformers replaces ``auto`` by the values of its TrainingArguments."""
    settings: dict[str, Any] = {
        "zero_optimization": {
            "stage": STAGES[run.launch.engine],
            # Prefetching relies on the previous step's order of layers, which a process without images does not follow.
            "stage3_prefetch_bucket_size": 0,
        },
        "gradient_clipping": "auto",
        "gradient_accumulation_steps": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "steps_per_print": 10**9,
    }
    if run.optimization.precision == "bfloat16":
        # Trainable weights and gradient sums stay in float32, as under the other engines.
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return settings


def prepare_for_zero(launch: Launch, model: TrainingModel) -> None:
    """Makes all processes run the same modules in the same order, including those whose samples have no image.

    DeepSpeed reduces gradients in the order in which they are computed, and ZeRO-3 gathers a module's weights when it
    is called. So a text-only batch runs a blank image through the encoder. ZeRO-3 gathers each decoder layer as one
    unit and everything else at the start of a step, as ``fsdp.shard`` does.
    """
    model.encode_blank_image = True
    if launch.engine is Engine.ZERO2:
        return
    from deepspeed.runtime.zero import register_external_parameter
    from deepspeed.utils import set_z3_leaf_modules

    layers = model.student.get_decoder().layers
    set_z3_leaf_modules(model, [type(layers[0])])
    in_layers = set(layers.parameters())
    for parameter in model.parameters():
        if parameter not in in_layers:
            register_external_parameter(model, parameter)


def save_zero_checkpoint(engine: Any, folder: Path, launch: Launch, processes: int, first: bool) -> None:
    """Writes DeepSpeed's checkpoint of trainable weights and optimizer state; the ``first`` process writes ``WRITER``.

    Every process must call.
    """
    engine.save_checkpoint(str(folder), exclude_frozen_parameters=True)
    if first:
        text = json.dumps({"engine": launch.engine.value, "processes": processes})
        (folder / WRITER).write_text(text, encoding="utf-8")


def require_same_writer(checkpoint: Path, launch: Launch, processes: int) -> None:
    """Checks that a DeepSpeed checkpoint is resumed with the same engine and number of processes, and no other one.

    Raises:
        ConfigError: names what wrote the checkpoint, what this run uses, and how to continue.
    """
    file = checkpoint / WRITER
    now = {"engine": launch.engine.value, "processes": processes} if uses_zero(launch) else None
    then = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    if then == now:
        return
    plural = "es" if processes > 1 else ""
    this_run = f"this run has launch.engine={launch.engine.value} with {processes} process{plural}"
    if then is None:
        raise ConfigError(
            f"checkpoint '{checkpoint}' was not written by DeepSpeed, but {this_run}: DeepSpeed can only resume its "
            "own checkpoints. Resume with launch.engine=ddp or fsdp, or train from step 0 into another output"
        )
    raise ConfigError(
        f"checkpoint '{checkpoint}' was written by launch.engine={then['engine']} with {then['processes']} processes, "
        f"but {this_run}: a DeepSpeed checkpoint can only be resumed with the engine and the number of processes that "
        f"wrote it. Resume with launch.engine={then['engine']} launch.processes={then['processes']}, or train from "
        "step 0 into another output"
    )
