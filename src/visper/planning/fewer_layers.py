"""A step of a deep decoder, traced with a few of its equal layers; what the others would hold is added exactly.

Each layer left out would hold from its forward pass on what its likes were seen to hold, and leave its gradients behind
its backward pass. Between two traced layers, memory therefore moves on a straight line, and both ends are looked at.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

EDGE = 3
"""Layers at each end that are traced: the middle one of the three shows what one of them holds."""


class Held(Protocol):
    """Bytes that are held, and the most that were (``fake_step.LiveBytes``)."""

    now: float
    most: float


def layers_to_trace(layers: Sequence[nn.Module], tapped: Collection[int]) -> list[int]:
    """Indices of the layers that say everything about ``layers``: of both ends, and those that are tapped.

    All of them where they are not equal, where taps are too near to an end, or where little would be left out.

    Args:
        layers: of a decoder.
        tapped: those whose hidden states are read, counted from 1 (0: what the first one is given).
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
    """What tells one layer from another: its parameters, and the settings of its parts except the layer's number."""
    parameters = tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in layer.named_parameters())
    settings = tuple(
        (name, type(part), key, repr(value))
        for name, part in layer.named_modules()
        for key, value in sorted(vars(part).items())
        if key != "layer_idx" and isinstance(value, (bool, int, float, str, tuple, type(None)))
    )
    return parameters, settings


class LeftOut(nn.Module):
    """Stands where a layer was; gives what it is given, in the form in which ``like`` gives it."""

    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        self.__dict__["like"] = like  # not a part of this module
        self.gives_tuple = False

    def __getattr__(self, name: str) -> Any:
        """Settings that a decoder asks its layers for."""
        return getattr(self.__dict__["like"], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """``hidden_states``."""
        return (hidden_states,) if self.gives_tuple else hidden_states


class FewLayers:
    """A decoder while only some of its layers run, and the most that was held with all of them.

    Args:
        decoder: with ``layers``.
        kept: indices of the layers that run (``layers_to_trace``).
        gradient: bytes of the gradients that a layer leaves, none where they are there before.
    """

    def __init__(self, decoder: Any, kept: Sequence[int], gradient: float) -> None:
        self._decoder, self._kept, self._gradient = decoder, kept, gradient
        self._count = len(decoder.layers)
        self._missing = self._count - len(kept)
        self._before: dict[int, float] = {}
        self._behind: dict[int, float] = {}
        # Layers left out by what they hold: of a forward pass that goes on, for the backward pass, their gradients.
        self._now = (0, 0, 0)
        self._segments: list[tuple[tuple[int, int, int], float]] = []

    @contextlib.contextmanager
    def run(self, live: Held) -> Iterator[None]:
        """While it is entered, the other layers are left out, and ``live`` is read as the pass goes on."""
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

    def turn(self) -> None:
        """The forward pass is over, autocast's copies of weights are gone."""
        self._mark(0, self._missing, 0)

    def most(self) -> float | None:
        """Bytes with all layers at the moment when most is held; None: layers that look alike hold unlike amounts."""
        places = (1, self._count - 2)
        if len(self._behind) < len(self._kept):  # no gradient came by
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
