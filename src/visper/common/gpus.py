"""A table of GPUs (peak FLOPs per second, memory), the choice of attention, and the error when GPU memory is full."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from visper.common.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Gpu:
    """``peak``: dense bfloat16 FLOPs per second with float32 accumulation, None if unknown; ``memory_gb``: nominal
    memory in units of 10^9 bytes."""

    peak: float | None
    memory_gb: float


GPUS: dict[str, Gpu] = {
    "B200": Gpu(2250e12, 180),
    "H200 NVL": Gpu(835e12, 141),
    "H200": Gpu(989e12, 141),
    "H100 PCIe": Gpu(756e12, 80),
    "H100 NVL": Gpu(835e12, 94),
    "H100": Gpu(989e12, 80),
    "A100 40GB": Gpu(312e12, 40),
    "A100": Gpu(312e12, 80),
    "L40S": Gpu(362e12, 48),
    "L4": Gpu(121e12, 24),
    "A10G": Gpu(70e12, 24),
    "A10": Gpu(125e12, 24),
    "RTX 4090": Gpu(165e12, 24),
    "RTX 3090": Gpu(71e12, 24),
}
"""Keyed by words of the device name; a name that contains another comes first. From data sheets, without sparsity."""


def find_gpu(name: str, memory_gb: float | None = None) -> Gpu:
    """The table's entry for a GPU, by its name there or the driver's, ignoring case.

    Args:
        name: for example ``H100`` or ``NVIDIA A100-SXM4-80GB``.
        memory_gb: used for a GPU that is not in the table; its peak is then unknown.

    Raises:
        ConfigError: the GPU is not in the table and its memory is not given.
    """
    found = _named(name)
    if found is not None:
        return found
    if memory_gb is None:
        raise ConfigError(
            f"--gpu '{name}' is not in the table: use one of {', '.join(GPUS)}, or add --gpu-memory GB (then memory is "
            "planned, but not time)"
        )
    return Gpu(None, memory_gb)


def gpu_at(device: torch.device) -> Gpu | None:
    """The table's entry for this device; None if it is not a GPU or not in the table."""
    if device.type != "cuda":
        return None
    import torch

    return _named(torch.cuda.get_device_name(device))


def _named(name: str) -> Gpu | None:
    words = name.lower().replace("-", " ").split()
    return next((gpu for known, gpu in GPUS.items() if all(word in words for word in known.lower().split())), None)


def peak_of(device: torch.device) -> float | None:
    """Peak FLOPs per second of this device; None if it is not a GPU or not in the table."""
    gpu = gpu_at(device)
    return gpu.peak if gpu else None


def memory_of(device: torch.device) -> float:
    """Memory of this GPU in bytes: the smaller of the table's value, which `visper plan` uses too, and the driver's,
    which is smaller on a slice of a GPU. The driver's alone if the GPU is not in the table."""
    import torch

    found, own = gpu_at(device), float(torch.cuda.get_device_properties(device).total_memory)
    return min(own, found.memory_gb * 1e9) if found else own


def avoid_plans_by_shape() -> None:
    """Keeps cuDNN out of torch's attention: for every new shape it plans on the host for tens of milliseconds.

    Torch tries it first on H100, H200 and B200 if it is newer than 9.15, as with torch 2.11. But the lengths of samples
    and growing answers are always new here. Flash attention, which torch tries next, plans nothing.
    """
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)


@contextmanager
def explaining_full_memory() -> Iterator[None]:
    """Turns an out-of-memory error of the GPU into one that says what to change.

    Raises:
        TrainingError: the block ran out of GPU memory.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"the GPU's memory is full ({str(error).split('. GPU')[0]}): lower optimization.micro_batch, which does "
            "not change results; `visper plan RUN.yaml --gpus N` names the first change that fits. Then add --resume "
            "if a checkpoint was saved"
        ) from error
