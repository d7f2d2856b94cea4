"""Joins the processes that a launcher has started to one training."""

from __future__ import annotations

from datetime import timedelta

import torch
from accelerate import PartialState

from visper.common.errors import ConfigError
from visper.common.gpus import avoid_plans_by_shape
from visper.common.ranks import require_gpu_each, require_nccl
from visper.config import Launch
from visper.training.parallel.deepspeed import uses_zero, zero_state
from visper.training.parallel.fsdp import check_replicas


def join_processes(launch: Launch) -> PartialState:
    """Initializes distributed training and returns this process's state.

    Raises:
        ConfigError: one process sees several GPUs, several share one, torch lacks NCCL, or ``launch.replicas`` does not
            divide the number of processes.
    """
    require_nccl()
    require_gpu_each()
    timeout = timedelta(minutes=launch.timeout_minutes)
    on_gpu = torch.cuda.is_available()
    if on_gpu:  # TF32: the Trainer sets only torch's new flag, and torch 2.9's inductor cannot read the old one then
        torch.set_float32_matmul_precision("high")
        avoid_plans_by_shape()
    processes = zero_state(timeout) if uses_zero(launch) else PartialState(cpu=not on_gpu, timeout=timeout)
    count = torch.cuda.device_count()
    if processes.num_processes == 1 and count > 1:
        raise ConfigError(
            f"one process sees {count} GPUs: start one process per GPU (`torchrun --nproc-per-node {count} -m visper "
            "train ...`), or make only one visible (CUDA_VISIBLE_DEVICES=0)"
        )
    check_replicas(launch.replicas, processes.num_processes)
    return processes
