"""GPUs as their makers describe them: FLOPs per second, memory; and an error where the memory is full."""

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
    """``peak``: dense bfloat16 FLOPs per second with float32 sums, None where unknown; ``memory_gb``: 10^9 bytes,
    nominal."""

    peak: float | None
    memory_gb: float


GPUS: dict[str, Gpu] = {
    "B200": Gpu(2250e12, 180),
    "H200": Gpu(989e12, 141),
    "H100 PCIe": Gpu(756e12, 80),
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
"""By what stands in the device's name; the longer names first where one holds the other. Data sheets, no sparsity."""


def find_gpu(name: str, memory_gb: float | None = None) -> Gpu:
    """A GPU of the table by its name or the driver's, in any case; one that is not there by its memory, without a peak.

    Raises:
        ConfigError: it is not in the table and its memory is not given.
    """
    found = _named(name)
    if found is not None:
        return found
    if memory_gb is None:
        raise ConfigError(
            f"--gpu '{name}' is not in the table: use one of {', '.join(GPUS)}, or add --gpu-memory GB (memory is then "
            "planned, time is not)"
        )
    return Gpu(None, memory_gb)


def gpu_at(device: torch.device) -> Gpu | None:
    """The entry of the GPU at hand; None where its name is not in the table, or it is not a GPU."""
    if device.type != "cuda":
        return None
    import torch

    return _named(torch.cuda.get_device_name(device))


def _named(name: str) -> Gpu | None:
    words = name.lower().replace("-", " ").split()
    return next((gpu for known, gpu in GPUS.items() if all(word in words for word in known.lower().split())), None)


def peak_of(device: torch.device) -> float | None:
    """Peak FLOPs per second of the device at hand; None where its name is not in the table, or it is not a GPU."""
    gpu = gpu_at(device)
    return gpu.peak if gpu else None


def memory_of(device: torch.device) -> float:
    """Bytes of the GPU at hand: as the table says, so that a plan decides the same, or less, where it has less (a
    share of a divided GPU); as the driver says where the table does not know it."""
    import torch

    found, own = gpu_at(device), float(torch.cuda.get_device_properties(device).total_memory)
    return min(own, found.memory_gb * 1e9) if found else own


@contextmanager
def explaining_full_memory() -> Iterator[None]:
    """Says what to change where the GPU's memory does not suffice.

    Raises:
        TrainingError: it did not suffice inside.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"the GPU's memory is full ({str(error).split('. GPU')[0]}): lower optimization.micro_batch, which changes "
            "no result; `visper plan RUN.yaml --gpus N` names the first change that fits. Then add --resume, if a "
            "checkpoint was saved"
        ) from error
