"""GPUs as their makers describe them: operations a second, memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from visper.common.errors import ConfigError


@dataclass(frozen=True)
class Gpu:
    """``peak``: dense bfloat16 operations a second with float32 sums; ``memory_gb``: 10^9 bytes, nominal."""

    peak: float
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


def known_gpu(name: str) -> Gpu:
    """A GPU of the table by its name, in any case.

    Raises:
        ConfigError: it is not in the table.
    """
    for known, gpu in GPUS.items():
        if known.lower() == name.lower():
            return gpu
    raise ConfigError(f"--gpu {name} is not in the table: use one of {', '.join(GPUS)}")


def peak_of(device: torch.device) -> float | None:
    """Operations a second of the device at hand; None where its name is not in the table, or it is no GPU."""
    if device.type != "cuda":
        return None
    words = torch.cuda.get_device_name(device).replace("-", " ").split()
    found = [gpu for known, gpu in GPUS.items() if all(word in words for word in known.split())]
    return found[0].peak if found else None
