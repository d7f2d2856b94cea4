"""FSDP2: shards weights, gradients and optimizer state over the processes, and unshards weights for saving.

Decoder layers are gathered one at a time. Everything else, the encoder included, is one group that is gathered once per
step, so that a process without images never waits for one with images. ``fully_shard`` is called here instead of by
accelerate, which uses it on GPUs only; so the tests on two CPU processes run the same code as a cluster. Accelerate's
``no_sync`` therefore does not apply, see ``choose_reduction``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from visper.common.compat import is_partitioned
from visper.common.errors import ConfigError
from visper.common.ranks import first_decides, naming_lost_processes
from visper.config import Engine, Launch
from visper.training.module import TrainingModel


def check_replicas(replicas: int, processes: int) -> None:
    """Checks that each replica of the model gets the same number of processes, and more than one.

    Raises:
        ConfigError: they do not; the message says which values would work.
    """
    if replicas > 1 and (processes % replicas or processes == replicas):
        each = "one process" if processes == replicas else f"{processes / replicas:.3g} processes"
        raise ConfigError(
            f"launch.replicas is {replicas}, which gives each copy of the model {each} of {processes}: set it to the "
            f"number of nodes, or to another divisor of {processes} that is smaller than it; to keep the full model on "
            "every process, use launch.engine=ddp"
        )


def shares_weights(launch: Launch, processes: int) -> bool:
    """Whether ``shard`` gives each of the processes a share of the weights."""
    return launch.engine is Engine.FSDP and processes > 1


def shard(model: TrainingModel, processes: int, replicas: int, bfloat16: bool) -> float:
    """Shards the first process's ``model`` over all processes, in place.

    The other processes may hold the model on the meta device, so that only the first one needs memory for all weights.
    They receive weights and buffers, and for each parameter its precision and whether it is trainable.

    Args:
        replicas: number of copies of the model, each sharded over consecutive ranks (those of a node are consecutive).
        bfloat16: gather and multiply layers in bfloat16; trainable weights and gradient sums stay in float32.

    Returns:
        The share of the weights that this process holds.
    """
    first = dist.get_rank() == 0
    described = first_decides(lambda: {n: (p.dtype, p.requires_grad) for n, p in model.named_parameters()})
    apply_types(model, described)
    if (objective := model.objective) is not None:  # heads of the user's own are tried where they have weights
        objective.need_all = first_decides(lambda: objective.need_all)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()} if first else {}
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    if replicas == 1:
        mesh = init_device_mesh(device_type, (processes,), mesh_dim_names=("shards",))
    else:
        sizes = (replicas, processes // replicas)
        mesh = init_device_mesh(device_type, sizes, mesh_dim_names=("copies", "shards"))
    # Inputs are not cast, as under autocast without sharding: the residual stream of a trainable LLM stays in float32.
    precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    policy = precision if bfloat16 else MixedPrecisionPolicy()
    for layer in model.student.get_decoder().layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    for method in ("generate", "predict"):  # used by evaluation while training
        register_fsdp_forward_method(model, method)
    if not first:
        model.to_empty(device=mesh.device_type)
    assert dict(model.named_parameters()).keys() == described.keys(), "sharding untied tied weights"
    with naming_lost_processes():
        broadcast_weights(model, weights)
    local = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in model.parameters())
    return local / sum(p.numel() for p in model.parameters())


def apply_types(model: nn.Module, first: Mapping[str, tuple[torch.dtype, bool]]) -> None:
    """Sets each parameter's precision and ``requires_grad`` to the values of the ``first`` process, given by name.

    Raises:
        RuntimeError: the two models have different parameters.
    """
    own = dict(model.named_parameters())
    if own.keys() != first.keys():
        different = sorted(own.keys() ^ first.keys())
        raise RuntimeError(f"process {dist.get_rank()} and process 0 built different parameters: {different[:3]}")
    for name, (dtype, trainable) in first.items():
        own[name].data = own[name].data.to(dtype)
        own[name].requires_grad_(trainable)


@torch.no_grad()
def broadcast_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Sends the first process's ``weights``, one at a time, into every process's shards; then sends its buffers.

    Args:
        weights: on the first process, the full weights by parameter name, removed once sent to free memory; on the
            others empty.
    """
    for name, parameter in model.named_parameters():
        shape, dtype, device = parameter.shape, parameter.dtype, parameter.device
        set_value(parameter, weights.pop(name) if weights else torch.empty(shape, dtype=dtype, device=device))
    for _, buffer in model.named_buffers(remove_duplicate=False):
        value = buffer.contiguous()
        dist.broadcast(value, 0)
        buffer.copy_(value)


def choose_reduction(model: nn.Module, last: bool, once: bool) -> None:
    """Sets which gradient reductions the next backward pass does.

    Args:
        last: whether it is the step's last backward pass, which always reduces the step's sums completely.
        once: the earlier passes reduce nothing, and gradients accumulate unsharded in float32, 4 bytes per trainable
            parameter. Otherwise they reduce within a copy of the model, and copies exchange their shards once per step.
    """
    assert isinstance(model, FSDPModule)
    if once:
        model.set_requires_gradient_sync(last)
    else:
        model.set_requires_all_reduce(last)


def reshard(model: nn.Module) -> None:
    """Frees the weights that stay gathered after forward passes without a backward pass.

    Without this, the next training step ended in a segmentation fault (torch 2.15, gloo).
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_sharded(model: nn.Module) -> bool:
    """Whether ``model``'s weights are sharded, by FSDP or ZeRO-3."""
    return any(isinstance(parameter, DTensor) or is_partitioned(parameter) for parameter in model.parameters())


def full_tensor(tensor: Tensor) -> Tensor:
    """The full ``tensor``, whatever the engine. Every process must call."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    if is_partitioned(tensor):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor


def full_tensors(named: Iterable[tuple[str, Tensor]], keep: bool) -> dict[str, Tensor]:
    """The named tensors, unsharded and on the CPU, gathered one at a time.

    Every process must call; without ``keep`` the result is empty.
    """
    found = {}
    for name, tensor in named:
        full = full_tensor(tensor)
        if keep:
            found[name] = full.detach().cpu().contiguous()
    return found


@torch.no_grad()
def set_value(parameter: Tensor, value: Tensor) -> None:
    """Writes an unsharded ``value`` into a parameter, sharded or not."""
    if isinstance(parameter, DTensor):
        value = distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    parameter.copy_(value)


def unshard(model: nn.Module, keep: bool) -> None:
    """Replaces the shards by full weights on the CPU. The model can then be saved, but not trained any more.

    Every process must call; without ``keep`` the weights are replaced by empty tensors.
    """
    done: dict[Tensor, nn.Parameter] = {}  # tied weights stay tied
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter not in done:
                value = full_tensors([(name, parameter)], keep).get(name, torch.empty(0))
                done[parameter] = nn.Parameter(value, requires_grad=parameter.requires_grad)
            module.register_parameter(name, done[parameter])
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.cpu())  # Gemma multiplies its embeddings by one
