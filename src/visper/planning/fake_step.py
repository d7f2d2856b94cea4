"""One step of the real training model on fake tensors, to measure its memory and FLOPs without allocating or computing.

Floating-point tensors are torch's ``FakeTensor``: they have a shape, a type and a device, but no values. Token ids,
labels and whatever follows from them are ordinary tensors, because the model's own code reads their values (the
positions of the image, the supervised positions). Forward, backward, recomputation and AdamW are the trainer's own, so
nothing here depends on how a model is built.

``torch.distributed._tools.mem_tracker.MemTracker`` also reports memory, but does not accept frozen parameters (torch
2.15, the only version tried): it registers a gradient hook on every parameter, which fails with "cannot register a hook
on a tensor that doesn't require gradient". ``LiveBytes`` below does what is needed here.
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
"""Two of three operations on fake tensors only read the device. Answering here saves a tenth of a trace's time."""
INDEX = torch.ops.aten.index.Tensor


class FakeTensorMode(fake_tensor.FakeTensorMode):
    """torch's mode, but it looks for GPUs once, not at every operation: a fifth of a trace's time on a CPU machine."""

    @cached_property
    def avoid_device_init(self) -> bool:
        """True on a machine without a GPU."""
        return super().avoid_device_init


class KnownPositions(TorchDispatchMode):
    """Lets a real boolean mask index a fake tensor: the result's size is the number of True entries.

    ``FakeTensor`` itself never reads values and refuses such an index.
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
        self.on_result(result)
        return result

    def on_result(self, result: Any) -> None:
        """Called with the result of every operation. Does nothing here; for subclasses to override."""

    def _positions(self, index: Tensor | None) -> list[Tensor | None]:
        if index is None or isinstance(index, FakeTensor) or index.dtype is not torch.bool:
            return [index]
        count = int(index.sum())
        with self.fake:
            return [torch.empty(count, dtype=torch.long) for _ in range(index.dim())]


class LiveBytes(KnownPositions):
    """Counts the bytes of all storages made while it is active and not yet freed: ``now``, and the peak, ``most``.

    Args:
        known: earlier tensors, whose storages are not counted.
    """

    def __init__(self, fake: FakeTensorMode, known: Sequence[Tensor]) -> None:
        super().__init__(fake)
        self.now = self.most = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._alive: dict[int, Any] = {}

    def on_result(self, result: Any) -> None:
        """Counts the new storages of the tensors in ``result``."""
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
    """Peak bytes of a training step beyond weights, gradients, optimizer state and targets.

    The step is a forward and a backward pass of one micro-batch, gradient clipping and an AdamW step.

    Args:
        model: has fake parameters and is in training mode.
        batch: arguments of the model's forward pass; floating-point tensors are fake.
        accumulates: gradients of an earlier micro-batch of the same step are already there.
        few: runs some layers and adds what the others would hold; default: all layers run.
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
            few.forward_done()
        loss.backward()
        if run.optimization.max_grad_norm:
            nn.utils.clip_grad_norm_(trainable, run.optimization.max_grad_norm)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    most = few.most() if few else live.most
    if most is None:
        return step_activations(model, optimizer, batch, run, fake, accumulates, watch)
    return float(most if accumulates else max(0, most - size))
