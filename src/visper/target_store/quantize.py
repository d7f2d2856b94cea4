"""Encodes targets as float32, float16 or eight bits with scales, and decodes them.

Eight-bit targets have one scale per channel (over the tokens of a target), because backbones have a few channels that
are always large: a scale per token would spend its range on these. Targets of few tokens have a scale per token, as
scales per channel would take more space than the values. Both are measured in docs/targets.md.

Shape suffixes: B = samples, N = teacher tokens, E = teacher width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from visper.common.errors import ConfigError
from visper.distillation.teachers.base import TargetSpec

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
LARGEST = {"int8": 127.0, "fp8": 448.0}
FEW_TOKENS = 16
_SCALE_BYTES = 4


@dataclass(frozen=True)
class TargetCodec:
    """Encodes targets of the shape ``spec`` in ``dtype``, a key of ``DTYPES``, and decodes them."""

    spec: TargetSpec
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"targets cannot be stored as '{self.dtype}': choose one of {', '.join(DTYPES)}")

    @property
    def scales(self) -> tuple[int, int]:
        """Shape of a target's scales, which broadcasts to ``[N, E]``; ``(0, 0)`` if the dtype has none."""
        if self.dtype not in LARGEST:
            return 0, 0
        return (self.spec.tokens, 1) if self.spec.tokens < FEW_TOKENS else (1, self.spec.width)

    @property
    def target_bytes(self) -> int:
        """Bytes of one encoded target, scales included."""
        values = self.spec.tokens * self.spec.width * DTYPES[self.dtype].itemsize
        return values + self._scale_bytes

    @property
    def _scale_bytes(self) -> int:
        return self.scales[0] * self.scales[1] * _SCALE_BYTES

    def encode(self, targets_BNE: Tensor) -> tuple[Tensor, Tensor | None]:
        """Values ``[B, N, E]`` in ``dtype`` and, for eight bits, scales ``[B, *scales]`` float32.

        Raises:
            ConfigError: a target is not finite, or too large for float16.
        """
        targets_BNE = targets_BNE.detach().float()
        if not torch.isfinite(targets_BNE).all():
            raise ConfigError("a target of the teacher is not finite: try distillation.teacher_dtype=float32")
        if self.dtype not in LARGEST:
            values = targets_BNE.to(DTYPES[self.dtype])
            if not torch.isfinite(values).all():
                largest = float(targets_BNE.abs().max())
                raise ConfigError(
                    f"a target value of {largest:.3g} is beyond float16's 65504: store targets as float32 or fp8"
                )
            return values, None
        over = 2 if self.scales[1] == 1 else 1
        largest_B = targets_BNE.abs().amax(over, keepdim=True)
        scale = torch.where(largest_B > 0, largest_B / LARGEST[self.dtype], torch.ones_like(largest_B))
        scaled = (targets_BNE / scale).clamp(-LARGEST[self.dtype], LARGEST[self.dtype])
        return (scaled.round() if self.dtype == "int8" else scaled).to(DTYPES[self.dtype]), scale

    def pack(self, targets_BNE: Tensor) -> Tensor:
        """Encodes targets and packs them with their scales: ``[B, target_bytes]`` uint8 on the CPU.

        Raises:
            ValueError: see ``encode``.
        """
        values, scales = self.encode(targets_BNE)
        parts = [values] if scales is None else [scales, values]
        return torch.cat([part.contiguous().view(torch.uint8).flatten(1) for part in parts], 1).cpu()

    def unpack(self, packed: Tensor) -> tuple[Tensor, Tensor | None]:
        """The values and scales, as from ``encode``, of packed targets ``[B, target_bytes]``."""
        # A slice may start at any byte; its copy is aligned for every type.
        values = packed[:, self._scale_bytes :].flatten().clone().view(DTYPES[self.dtype])
        values = values.view(len(packed), self.spec.tokens, self.spec.width)
        if not self._scale_bytes:
            return values, None
        scales = packed[:, : self._scale_bytes].flatten().clone().view(torch.float32)
        return values, scales.view(len(packed), *self.scales)

    def join(self, values: Tensor, scales: Tensor | None) -> Tensor:
        """Packs an encoded target ``[N, E]`` with its scales, ``[target_bytes]`` uint8: its form in a batch."""
        content = values.reshape(-1).view(torch.uint8)
        return content if scales is None else torch.cat((scales.reshape(-1).view(torch.uint8), content))

    def decode(self, packed: Tensor) -> Tensor:
        """Decodes packed targets ``[B, target_bytes]`` to ``[B, N, E]`` float32, on their device."""
        values, scales = self.unpack(packed)
        return values.float() if scales is None else values.float() * scales
