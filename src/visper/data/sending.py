"""Sending batches from a loader process to the main process."""

from __future__ import annotations

import io
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor

SMALL = 1 << 16  # bytes; smaller tensors are copied faster than they are shared
_DTYPES = (torch.int64, torch.int32, torch.bool, torch.float32)  # of the tensors derived from token ids


class SentBatch(dict[str, Any]):
    """A batch that is unpickled as a plain dict; its small tensors are copied into the message.

    torch shares each tensor through its own file, whose descriptor is passed through its own socket: 0.3 ms of CPU time
    even for a few numbers, and a pre-training batch has about 20 such tensors. Pixels stay in shared memory.
    """

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        message = io.BytesIO()
        _SmallTensorsPickler(message).dump(dict(self))
        return ForkingPickler.loads, (message.getvalue(),)


class _SmallTensorsPickler(ForkingPickler):
    def reducer_override(self, value: Any) -> Any:
        if type(value) is Tensor and value.dtype in _DTYPES and value.nbytes <= SMALL:
            return torch.from_numpy, (value.numpy(),)
        return NotImplemented
