"""Traces a step of a deep decoder with a few of its identical layers, and adds what the others would hold, exactly.

A skipped layer would hold as much as the identical traced layers: activations from its forward pass on, gradients after
its backward pass. So between two traced layers memory changes linearly, and its maximum lies at one of the two ends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

EDGE = 3
"""Layers traced at each end. The middle one of the three shows how much a single layer holds."""


class Held(Protocol):
    """Bytes held now, and their peak (``fake_step.LiveBytes``)."""

    now: float
    most: float


def layers_to_trace(layers: Sequence[nn.Module], tapped: Collection[int]) -> list[int]:
    """Indices of the layers that represent all of ``layers``: those at both ends, and the tapped ones.

    All indices if the layers differ, if one next to an end is tapped, or if few layers would be skipped.

    Args:
        tapped: layers whose hidden states are read, counted from 1 (0: the input of the first layer).
    """
    count = len(layers)
    everything = list(range(count))
    read = {layer - 1 for layer in tapped} & set(everything)
    kept = sorted({*everything[:EDGE], *everything[-EDGE:], *read})
    unclear = read & {0, 1, count - 3, count - 2}
    if unclear or len(kept) + EDGE > count or len({_kind(layer) for layer in layers}) > 1:
        return everything
    return kept


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    """Equal for identical layers: the parameters, and the settings of all submodules except the layer index."""
    parameters = tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in layer.named_parameters())
    settings = tuple(
        (name, type(part), key, repr(value))
        for name, part in layer.named_modules()
        for key, value in sorted(vars(part).items())
        if key != "layer_idx" and isinstance(value, (bool, int, float, str, tuple, type(None)))
    )
    return parameters, settings


class LeftOut(nn.Module):
    """Replaces a skipped layer: returns its input, in the form in which ``like`` returns its output."""

    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        self.__dict__["like"] = like  # not a part of this module
        self.gives_tuple = False

    def __getattr__(self, name: str) -> Any:
        """Settings that the decoder reads from its layers."""
        return getattr(self.__dict__["like"], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Returns ``hidden_states`` unchanged."""
        return (hidden_states,) if self.gives_tuple else hidden_states


class FewLayers:
    """Runs only some layers of a decoder, and calculates the peak memory with all of them.

    Args:
        kept: indices of the layers that run (``layers_to_trace``).
        gradient: bytes of the gradients that a layer's backward pass makes; 0 if they exist before it.
    """

    def __init__(self, decoder: Any, kept: Sequence[int], gradient: float) -> None:
        self._decoder, self._kept, self._gradient = decoder, kept, gradient
        self._count = len(decoder.layers)
        self._missing = self._count - len(kept)
        self._before: dict[int, float] = {}
        self._behind: dict[int, float] = {}
        # Numbers of skipped layers that hold: activations during the forward pass; activations after it; gradients.
        self._now = (0, 0, 0)
        self._segments: list[tuple[tuple[int, int, int], float]] = []

    @contextlib.contextmanager
    def run(self, live: Held) -> Iterator[None]:
        """Skips the other layers inside the context, and reads ``live`` at each layer."""
        layers, self._live = self._decoder.layers, live
        others = {place: LeftOut(layers[0]) for place in range(self._count) if place not in self._kept}
        handles = [
            handle
            for at, place in enumerate(self._kept)
            for handle in (
                layers[place].register_forward_pre_hook(self._enter(place, place - at)),
                layers[place].register_forward_hook(self._leave(place, place - at, others.values())),
            )
        ]
        self._decoder.layers = nn.ModuleList(others.get(place, layers[place]) for place in range(self._count))
        try:
            yield
            self._mark(0, 0, self._missing)
        finally:
            self._decoder.layers = layers
            for handle in handles:
                handle.remove()

    def forward_done(self) -> None:
        """To be called after the forward pass, when autocast's copies of weights are freed."""
        self._mark(0, self._missing, 0)

    def most(self) -> float | None:
        """Peak bytes with all layers; None if layers that look identical hold different amounts."""
        places = (1, self._count - 2)
        if len(self._behind) < len(self._kept):  # no gradient reached some layers
            return None
        forward = {self._before[place + 1] - self._before[place] for place in places}
        held = {self._gradient + self._behind[place] - self._behind[place - 1] for place in places}
        if len(forward) > 1 or len(held) > 1:
            return None
        each = (forward.pop(), held.pop(), self._gradient)
        return max(
            most + sum(n * size for n, size in zip(counts, each, strict=True)) for counts, most in self._segments
        )

    def _mark(self, forward: int, held: int, done: int) -> None:
        self._segments.append((self._now, self._live.most))
        self._now, self._live.most = (forward, held, done), self._live.now

    def _enter(self, place: int, others_before: int) -> Any:
        def enter(*_: Any) -> None:
            if place not in self._before:  # not when it is recomputed
                self._before[place] = self._live.now
                self._mark(others_before, 0, 0)

        return enter

    def _leave(self, place: int, others_before: int, others: Collection[LeftOut]) -> Any:
        def backward(gradient: Tensor) -> None:
            self._behind[place] = self._live.now
            self._mark(0, others_before, self._missing - others_before)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            for other in others:
                other.gives_tuple = isinstance(output, tuple)
            if not self._behind and states.requires_grad:
                states.register_hook(backward)

        return leave
