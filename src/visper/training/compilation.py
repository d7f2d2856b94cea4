"""``optimization.compile``: compiles each decoder layer and each predictor separately with ``torch.compile``.

They contain most of a step's operations other than matrix products. Compiling parts instead of the model leaves
everything between them uncompiled: tap hooks, FSDP and ZeRO, activation checkpointing, text-only batches.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import wraps
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from visper.common.compat import compile_error, sees_operations
from visper.common.errors import ConfigError
from visper.config import Run
from visper.training.module import TrainingModel

COMPILERS = ("cc", "gcc", "clang", "g++", "clang++")
Backend = str | Callable[..., Any]


def require_compiler(run: Run) -> None:
    """Checks, before anything is loaded, that a C compiler is available if the run uses inductor.

    Raises:
        ConfigError: none is found. Inductor compiles C++ for a CPU, and Triton a C module for a GPU.
    """
    if run.optimization.compile != "inductor":
        return
    named = [os.environ[name] for name in ("CC", "CXX") if os.environ.get(name)]
    if not any(shutil.which(name) for name in (*named, *COMPILERS)):
        raise ConfigError(
            "optimization.compile=inductor needs a C compiler, and none is on the PATH: install gcc and g++, set CC "
            "and CXX to yours, or set optimization.compile=null"
        )


def compile_parts(model: TrainingModel, backend: Backend) -> None:
    """Compiles decoder layers and predictors for training; in evaluation mode they run uncompiled.

    Call it after sharding, which changes the classes of the layers. Weights keep their names.
    """
    micro_batch = _MicroBatch()
    model.register_forward_pre_hook(micro_batch.begin)
    for layer in model.student.get_decoder().layers:  # identical layers share their graphs
        _compile_forward(layer, layer.forward, backend, micro_batch)
    heads = () if model.objective is None else model.objective.predictors.values()
    for head in heads:
        if any(True for _ in head.parameters()):
            _compile_forward(head, _with_own_code(head.forward), backend, micro_batch)


class _MicroBatch:
    """Whether the parts run compiled in the current micro-batch.

    FLOPs can only be counted in an uncompiled forward pass. The backward pass of that micro-batch is not counted, but
    what it recomputes must run uncompiled too: a compiled layer saves other tensors.
    """

    compiled = True

    def begin(self, model: nn.Module, args: Any) -> None:
        """Decides for a forward pass that is about to start, and for its backward pass."""
        self.compiled = not sees_operations()


def _compile_forward(part: nn.Module, own: Callable[..., Any], backend: Backend, micro_batch: _MicroBatch) -> None:
    """Replaces ``part.forward`` by a compiled version of ``own``, its forward without hooks.

    Sets an attribute of this one object: the class belongs to its library, and ``part.compile()`` would compile the
    hooks too, while taps register new hooks for each forward pass. A graph break is an error instead of a slow run.
    """
    eager = part.forward
    failed = compile_error()
    compiled = torch.compile(own, backend=backend, dynamic=True, fullgraph=True)

    @wraps(eager)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not part.training or not micro_batch.compiled:  # answers and held-out losses would need more graphs
            return eager(*args, **kwargs)
        try:
            return compiled(*args, **kwargs)
        except failed as error:
            raise ConfigError(
                f"optimization.compile: {type(part).__name__} cannot be compiled as one graph: set "
                f"optimization.compile=null ({str(error).strip().splitlines()[0]})"
            ) from error

    part.forward = forward


def _with_own_code(method: Any) -> Any:
    """A copy of a bound method with its own code object.

    ``torch.compile`` counts recompilations per code object and allows eight; heads of several tasks would exceed that.
    """
    function = method.__func__
    own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__, None, function.__closure__)
    own.__defaults__, own.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    return MethodType(own, method.__self__)
