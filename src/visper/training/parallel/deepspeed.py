"""DeepSpeed's ZeRO through accelerate: its settings, and its state as the engine-independent checkpoints hold it.

ZeRO-2 shares out gradients and optimizer state of what learns; ZeRO-3 all weights too, frozen ones included.
"""

from __future__ import annotations

import importlib.util
import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import PartialState
from torch import Tensor, nn

from visper.common.errors import ConfigError
from visper.config import Engine, Launch, Run
from visper.training.module import TrainingModel

STAGES = {Engine.ZERO2: 2, Engine.ZERO3: 3}
MOMENTS = ("exp_avg", "exp_avg_sq")
STEP = "step"


def uses_zero(launch: Launch) -> bool:
    """Whether DeepSpeed is to share out something in this process, which then is prepared for it.

    Raises:
        ConfigError: it is not installed; the message names the extra.
    """
    if launch.engine not in STAGES or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return False
    require_deepspeed(launch)
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    import transformers.trainer

    # transformers looks for DeepSpeed's own files on resuming; ours are whole, by name, and any engine's.
    transformers.trainer.deepspeed_load_checkpoint = lambda *args, **kwargs: None
    return True


def zero_state(timeout: timedelta) -> PartialState:
    """The processes, as DeepSpeed wants them: accelerate does not know it on CPUs, unless it is not told of them."""
    return PartialState(cpu=False, backend=None if torch.cuda.is_available() else "gloo", timeout=timeout)


def require_deepspeed(launch: Launch) -> None:
    """Raises ConfigError if the engine needs DeepSpeed and it is not installed."""
    if launch.engine in STAGES and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            f"launch.engine is {launch.engine}, which is DeepSpeed's, and that is not installed: "
            "DS_BUILD_OPS=0 pip install 'visper-lm[deepspeed]', or take launch.engine=fsdp"
        )


def zero_settings(run: Run) -> dict[str, Any]:
    """DeepSpeed's configuration; ``auto`` is what transformers fills in from its own arguments."""
    settings: dict[str, Any] = {
        "zero_optimization": {
            "stage": STAGES[run.launch.engine],
            # Fetching ahead follows the layers of the step before: a process whose rows have no image goes other ways.
            "stage3_prefetch_bucket_size": 0,
        },
        "gradient_clipping": "auto",
        "gradient_accumulation_steps": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "steps_per_print": 10**9,
    }
    if run.optimization.precision == "bfloat16":
        # Learning weights and gradients' sums stay in float32, as under the other engines.
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return settings


def prepare_for_zero(launch: Launch, model: TrainingModel) -> None:
    """Makes all processes do the same in the same order, also those whose rows have no image.

    DeepSpeed sums gradients in the order they arrive in, and ZeRO-3 gathers a module's weights when it is called. So
    batches without images send a blank picture along; and what ZeRO-3 gathers together is, as in ``sharding``, each
    decoder layer, and all else at the start of a step.
    """
    model.blank_pictures = True
    if launch.engine is Engine.ZERO2:
        return
    from deepspeed.runtime.zero import register_external_parameter
    from deepspeed.utils import set_z3_leaf_modules

    layers = model.student.model.language_model.layers
    set_z3_leaf_modules(model, [type(layers[0])])
    inside = set(layers.parameters())
    for parameter in model.parameters():
        if parameter not in inside:
            register_external_parameter(model, parameter)


def optimizer_state(model: nn.Module, optimizer: Any, keep: bool) -> dict[str, Any]:
    """What torch's own ``get_optimizer_state_dict`` gives for an unsharded model. Every process must call."""
    from deepspeed.utils import safe_get_full_optimizer_state

    _link(optimizer)
    names = {parameter: name for name, parameter in model.named_parameters()}
    step = optimizer.optimizer.state[_flat(optimizer)[0]][STEP].cpu()
    state, groups = {}, []
    for group, parameters in zip(optimizer.optimizer.param_groups, _groups(optimizer), strict=True):
        for parameter in parameters:
            moments = {moment: safe_get_full_optimizer_state(parameter, moment) for moment in MOMENTS}
            if keep:
                state[names[parameter]] = {STEP: step.clone(), **{k: v.cpu().clone() for k, v in moments.items()}}
        groups.append({**group, "params": [names[parameter] for parameter in parameters]})
    return {"state": state, "param_groups": groups}


def load_optimizer_state(model: nn.Module, optimizer: Any, saved: dict[str, Any]) -> None:
    """The other way round, before the first step."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    base = optimizer.optimizer
    step = next(iter(saved["state"].values()))[STEP]
    for flat in _flat(optimizer):
        place = flat.device if base.defaults.get("fused") or base.defaults.get("capturable") else "cpu"
        base.state[flat] = {STEP: step.clone().to(place), **{moment: torch.zeros_like(flat) for moment in MOMENTS}}
    _link(optimizer)
    for group, theirs, parameters in zip(base.param_groups, saved["param_groups"], _groups(optimizer), strict=True):
        group.update({name: value for name, value in theirs.items() if name != "params"})
        for parameter in parameters:
            for moment in MOMENTS:
                _set_moment(parameter, moment, saved["state"][names[parameter]][moment])


def _set_moment(parameter: nn.Parameter, moment: str, value: Tensor) -> None:
    from deepspeed.utils import (
        safe_get_local_optimizer_state,
        safe_set_full_optimizer_state,
        safe_set_local_optimizer_state,
    )

    if not hasattr(parameter, "ds_id"):
        safe_set_full_optimizer_state(parameter, value.to(parameter.device), moment)
        return
    # ZeRO-3's own way cannot set what does not divide by the processes: the last share is padded.
    own = safe_get_local_optimizer_state(parameter, moment)
    padded = F.pad(value.flatten(), (0, own.numel() * dist.get_world_size() - value.numel()))
    safe_set_local_optimizer_state(parameter, padded.split(own.numel())[dist.get_rank()].to(own.device), moment)


def _link(optimizer: Any) -> None:
    """Tells ZeRO-2's parameters where their moments are; DeepSpeed does so before any group but the first has some."""
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def _flat(optimizer: Any) -> list[Tensor]:
    """What DeepSpeed's inner optimizer steps: this process' shares, flat."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return list(optimizer.fp32_partitioned_groups_flat)
    return list(optimizer.single_partition_of_fp32_groups)


def _groups(optimizer: Any) -> list[list[nn.Parameter]]:
    """The parameters of each group of the inner optimizer."""
    if not hasattr(optimizer, "fp16_groups"):
        return [list(group) for group in optimizer.bit16_groups]
    groups: list[list[nn.Parameter]] = [[] for _ in optimizer.optimizer.param_groups]
    for place, parameters in enumerate(optimizer.fp16_groups):
        groups[optimizer.sub_group_to_group_id[place]].extend(parameters)
    return groups
