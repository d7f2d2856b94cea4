"""One training step of the real training model without memory or arithmetic: what it holds, what it computes.

Floating-point tensors are torch's ``FakeTensor``: they have a shape, a type and a device, but no values. Token ids,
labels and whatever follows from them are ordinary tensors, because the model's own code reads them (where the image
lies, which positions are supervised). Forward, backward, recomputation and AdamW are the trainer's, so nothing here
knows how a model is built.

``torch.distributed._tools.mem_tracker.MemTracker`` would report memory too, but tried on torch 2.15 (the only version
tried) it does not take frozen parameters: it registers a gradient hook on every parameter, which fails with "cannot
register a hook on a tensor that doesn't require gradient". ``LiveBytes`` below is what is needed of it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from visper.config import Run
from visper.planning.fewer_layers import FewLayers

DEVICE = torch.ops.prim.device.default
"""Asked of fake tensors by two of three calls, which need not pass torch's modes: a tenth of a trace's time."""
INDEX = torch.ops.aten.index.Tensor

__all__ = [
    "FakeTensorMode",
    "KnownPositions",
    "LiveBytes",
    "adamw",
    "autocast",
    "fake_parameters",
    "state_of",
    "step_activations",
]


class FakeTensorMode(fake_tensor.FakeTensorMode):
    """torch's, which asks for GPUs once and not at every operation: a fifth of a trace's time where there is none."""

    @cached_property
    def avoid_device_init(self) -> bool:
        """Whether there is no GPU."""
        return super().avoid_device_init


class KnownPositions(TorchDispatchMode):
    """Lets a fake tensor be indexed by a real boolean mask: the result's size is the number of True entries.

    FakeTensor itself takes no values into account and refuses.
    """

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.fake = fake

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE:
            return args[0].fake_device
        if func is INDEX and isinstance(args[0], FakeTensor):
            args = (args[0], [place for index in args[1] for place in self._positions(index)])
        result = func(*args, **(kwargs or {}))
        self.look_at(result)
        return result

    def look_at(self, result: Any) -> None:
        """For subclasses: what an operation returned."""

    def _positions(self, index: Tensor | None) -> list[Tensor | None]:
        if index is None or isinstance(index, FakeTensor) or index.dtype is not torch.bool:
            return [index]
        count = int(index.sum())
        with self.fake:
            return [torch.empty(count, dtype=torch.long) for _ in range(index.dim())]


class LiveBytes(KnownPositions):
    """Bytes of all storages made inside and not yet freed: ``now``, and the ``most`` there were.

    Args:
        fake: made the tensors.
        known: tensors made before; their storages are not counted.
    """

    def __init__(self, fake: FakeTensorMode, known: Sequence[Tensor]) -> None:
        super().__init__(fake)
        self.now = self.most = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._alive: dict[int, Any] = {}

    def look_at(self, result: Any) -> None:
        """Counts the storages of the tensors in ``result`` that were not there before."""
        for leaf in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._alive or key in self._known:
            return
        size = storage.nbytes()

        def freed(_: Any) -> None:
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, freed)
        self.now += size
        self.most = max(self.most, self.now)


def fake_parameters(module: nn.Module, fake: FakeTensorMode) -> None:
    """Replaces every parameter and buffer of ``module`` by a fake one on the CPU, in place; tied ones stay tied."""
    made: dict[int, Tensor] = {}

    def replaced(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            made[id(tensor)] = (
                nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
            )
        return made[id(tensor)]

    with fake:
        for part in module.modules():
            tables: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
            for table in tables:
                table.update({name: replaced(tensor) for name, tensor in table.items() if tensor is not None})


def autocast(run: Run) -> AbstractContextManager[Any]:
    """The precision of the run's forward pass, for fake tensors."""
    return torch.autocast("cpu", torch.bfloat16, enabled=run.optimization.precision == "bfloat16")


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """The trainer's optimizer of ``model``'s trainable (fake) parameters, with the state it has after a step."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, fused=True)
    for parameter in trainable:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


def state_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors of the optimizer's state."""
    return [value for state in optimizer.state.values() for value in state.values()]


def step_activations(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Mapping[str, Any],
    run: Run,
    fake: FakeTensorMode,
    accumulates: bool = False,
    watch: Callable[[], AbstractContextManager[Any]] = nullcontext,
    few: FewLayers | None = None,
) -> float:
    """Bytes beyond weights, gradients, optimizer state and targets when most is held.

    One micro-batch goes forward and backward; gradients are clipped and AdamW steps.

    Args:
        model: of fake parameters, in training mode.
        optimizer: of ``adamw``.
        batch: what the model's forward takes; its floats are fake.
        run: gives precision and clipping.
        fake: made all of these.
        accumulates: an earlier micro-batch of the same step has left its gradients.
        watch: entered around the forward pass.
        few: only some layers run, the figure is that of all; default: all run.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = [torch.empty_like(parameter) for parameter in trainable]
    size = sum(gradient.nbytes for gradient in gradients)
    if accumulates:
        for parameter, gradient in zip(trainable, gradients, strict=True):
            parameter.grad = gradient
    pools = [targets.pool for targets in batch.get("targets", {}).values()]
    known = [*model.parameters(), *model.buffers(), *state_of(optimizer), *gradients, *pools]
    with LiveBytes(fake, known) as live, few.run(live) if few else nullcontext():
        with autocast(run), watch():
            loss = model(**batch)["loss"]
        if few:
            few.turn()
        loss.backward()
        if run.optimization.max_grad_norm:
            nn.utils.clip_grad_norm_(trainable, run.optimization.max_grad_norm)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    most = few.most() if few else live.most
    if most is None:
        return step_activations(model, optimizer, batch, run, fake, accumulates, watch)
    return float(most if accumulates else max(0, most - size))
