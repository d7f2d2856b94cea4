"""Finds, on a CPU, where a training step would make the host wait for a GPU. Used by a test and by ``gpu_check.py``.

On a GPU, ``torch.cuda.set_sync_debug_mode`` reports waits. A CPU never waits, but runs the same operations. This module
counts the operations whose result, or its size, the host must know, by their place in the code.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from visper.common.compat import around_operations

WAITING = frozenset(
    (
        "_local_scalar_dense",
        "is_nonzero",
        "equal",
        "nonzero",
        "masked_select",
        "unique_dim",
        "_unique2",
        "masked_scatter_backward",
    )
)
"""Operations whose result, or its size, the host must know."""
COPIED = (Tensor.tolist, Tensor.numpy, Tensor.cpu)
"""Tensor methods that copy to the host. They call no operation if the tensor is on the host already."""
THIS = Path(__file__).name


class HostWaits:
    """Counts how often each place would make the host wait.

    Args:
        packages: packages whose lines are reported; outside of them, only the operation is.

    Attributes:
        places: counts by place, as "file:line operation", of the innermost line in ``packages``.
    """

    def __init__(self, packages: tuple[str, ...] = ("visper", "transformers", "accelerate", "torch/optim")) -> None:
        self.places: Counter[str] = Counter()
        self._packages = tuple(f"/{package}/" for package in packages)

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Counts the operations of this thread inside the context."""
        with around_operations(self._operation), _Copies(self):
            yield

    def _operation(self, operation: Any, args: Any, kwargs: Any) -> Any:
        name = str(getattr(operation, "overloadpacket", operation)).split(".")[-1]
        counts_itself = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in WAITING or counts_itself or _masked(name, args):
            self.add(name)
        return operation(*args, **kwargs)

    def add(self, name: str) -> None:
        """Adds a wait of the operation ``name`` at the current line."""
        frames = [f for f in traceback.extract_stack() if any(package in f.filename for package in self._packages)]
        frames = [f for f in frames if not f.filename.endswith("common/compat.py")]
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno} " if frames else ""
        self.places[place + name] += 1


class _Copies(TorchFunctionMode):
    def __init__(self, waits: HostWaits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in COPIED:
            self.waits.add(func.__name__)
        if func is torch.tensor and (kwargs or {}).get("device") is not None:
            self.waits.add("tensor, copied to the device")
        return func(*args, **(kwargs or {}))


def _masked(name: str, args: Any) -> bool:
    """True if an index is a mask, whose True entries must be counted."""
    if name not in ("index", "index_put", "index_put_"):
        return False
    return any(isinstance(index, Tensor) and index.dtype is torch.bool for index in args[1])
