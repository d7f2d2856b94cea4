"""FSDP2: weights, gradients and optimizer state sharded over the processes, and unsharded for what is written.

The decoder's layers are gathered one at a time; everything else, the encoder included, makes one group that is gathered
once a step, so that a process whose samples have no image never waits for one whose samples have. torch's
``fully_shard`` is called here and not by accelerate, which uses it on GPUs only: what the tests run on two CPU
processes is what a cluster runs. So accelerate's ``no_sync`` does not know of it either (``choose_reduction``).
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
from visper.training.module import TrainingModel


def check_replicas(replicas: int, processes: int) -> None:
    """Refuses copies that do not each have the same number of processes, and more than one.

    Raises:
        ConfigError: what it could be.
    """
    if replicas > 1 and (processes % replicas or processes == replicas):
        each = "one process" if processes == replicas else f"{processes / replicas:.3g} processes"
        raise ConfigError(
            f"launch.replicas is {replicas}, which gives each copy of the model {each} of {processes}: set it to the "
            "number of nodes, or to another divisor of the processes below their number; launch.engine=ddp does not "
            "share weights out"
        )


def shard(model: TrainingModel, processes: int, replicas: int, bfloat16: bool) -> float:
    """Shards the first process's ``model`` over all processes, in place.

    The others' need no values: with parameters on the meta device only the first one's memory holds a whole model. They
    get weights and buffers, and of each parameter its precision and whether it is trainable.

    Args:
        replicas: copies, each sharded over successive processes (torchrun numbers a node's in a row).
        bfloat16: layers are gathered and multiplied in it; trainable weights and gradient sums stay in float32.

    Returns:
        The share of the weights that lies on this process.
    """
    on_gpu = torch.cuda.is_available()
    first = dist.get_rank() == 0
    described = first_decides(lambda: {n: (p.dtype, p.requires_grad) for n, p in model.named_parameters()})
    take_after(model, described)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()} if first else {}
    sizes = (processes,) if replicas == 1 else (replicas, processes // replicas)  # (shard,) or (replicate, shard)
    mesh = init_device_mesh("cuda" if on_gpu else "cpu", sizes, mesh_dim_names=("copies", "shards")[-len(sizes) :])
    # Inputs keep their precision, as under autocast without sharding: a trainable LLM keeps a float32 residual stream.
    precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    policy = precision if bfloat16 else MixedPrecisionPolicy()
    for layer in model.student.get_decoder().layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    for method in ("generate", "predict"):  # answers and drawings while training
        register_fsdp_forward_method(model, method)
    if not first:
        model.to_empty(device=mesh.device_type)
    assert dict(model.named_parameters()).keys() == described.keys(), "tied weights came apart"
    with naming_lost_processes():
        send(model, weights)
    local = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in model.parameters())
    return local / sum(p.numel() for p in model.parameters())


def take_after(model: nn.Module, first: Mapping[str, tuple[torch.dtype, bool]]) -> None:
    """Gives each parameter the precision of the ``first`` process's, and makes it trainable where that one is.

    Raises:
        RuntimeError: the two models have other parameters.
    """
    own = dict(model.named_parameters())
    if own.keys() != first.keys():
        raise RuntimeError(f"process {dist.get_rank()} built other parameters: {sorted(own.keys() ^ first.keys())[:3]}")
    for name, (dtype, trainable) in first.items():
        own[name].data = own[name].data.to(dtype)
        own[name].requires_grad_(trainable)


@torch.no_grad()
def send(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Fills every process's shards with the first one's ``weights``, one at a time, and its buffers with that one's.

    Args:
        weights: full, by parameter name; empty on the others. Emptied, so that what was sent is freed.
    """
    for name, parameter in model.named_parameters():
        shape, dtype, device = parameter.shape, parameter.dtype, parameter.device
        put(parameter, weights.pop(name) if weights else torch.empty(shape, dtype=dtype, device=device))
    for _, buffer in model.named_buffers(remove_duplicate=False):
        value = buffer.contiguous()
        dist.broadcast(value, 0)
        buffer.copy_(value)


def choose_reduction(model: nn.Module, last: bool, once: bool) -> None:
    """Says how far the coming backward pass reduces its gradients; the ``last`` of a step reduces the step's sums.

    Args:
        once: the others reduce nothing; gradients add up unsharded in float32, 4 bytes for each trainable parameter.
            Otherwise they reduce within a copy of the model, and copies exchange their shards once a step.
    """
    assert isinstance(model, FSDPModule)
    if once:
        model.set_requires_gradient_sync(last)
    else:
        model.set_requires_all_reduce(last)


def reshard(model: nn.Module) -> None:
    """Frees the weights that forward passes without a backward pass have left gathered.

    Without this, the next training step ended in a segmentation fault (torch 2.15, gloo).
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_sharded(model: nn.Module) -> bool:
    """Whether ``model``'s weights are sharded."""
    return any(isinstance(parameter, DTensor) or is_partitioned(parameter) for parameter in model.parameters())


def gathered(tensor: Tensor) -> Tensor:
    """The full ``tensor``, whatever the engine. Every process must call."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    if is_partitioned(tensor):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor


def whole(named: Iterable[tuple[str, Tensor]], keep: bool) -> dict[str, Tensor]:
    """The named tensors, unsharded, on the CPU, gathered one at a time.

    Every process must call; those that do not ``keep`` get none.
    """
    found = {}
    for name, tensor in named:
        full = gathered(tensor)
        if keep:
            found[name] = full.detach().cpu().contiguous()
    return found


@torch.no_grad()
def put(parameter: Tensor, value: Tensor) -> None:
    """Writes an unsharded ``value`` into a parameter, sharded or not."""
    if isinstance(parameter, DTensor):
        value = distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    parameter.copy_(value)


def unshard(model: nn.Module, keep: bool) -> None:
    """Replaces the shards by full weights on the CPU, for good: the model can be saved, but not trained further.

    Every process must call; those that do not ``keep`` lose their weights.
    """
    done: dict[Tensor, nn.Parameter] = {}  # tied weights stay tied
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter not in done:
                value = whole([(name, parameter)], keep).get(name, torch.empty(0))
                done[parameter] = nn.Parameter(value, requires_grad=parameter.requires_grad)
            module.register_parameter(name, done[parameter])
