"""Finds the change of settings that makes a run fit its machine at the least cost in time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from visper.config import Engine, Stage
from visper.planning.fake_run import FakeRun
from visper.planning.memory import Memory, MemoryModel, Settings


@dataclass(frozen=True)
class Lever:
    """Settings that fit, the memory they need, and the changes as text."""

    settings: Settings
    memory: Memory
    changes: str


def first_lever(memory: MemoryModel, now: Settings, model_of: Callable[[bool], FakeRun]) -> Lever | None:
    """The change with the least slowdown that makes the run fit; None if none does, or if the limit is unknown.

    Args:
        model_of: returns the run's model, with LoRA if True.
    """
    limit = memory.machine.usable
    if limit is None:
        return None
    for other in sorted(_alternatives(memory, now), key=lambda other: _cost(now, other)):
        model = model_of(other.lora)
        if sum(memory.standing(other, model).values()) > limit:
            continue  # does not fit even without activations
        found = memory.memory(other, model)
        if found.total <= limit:
            return Lever(other, found, describe(now, other))
    return None


def _alternatives(memory: MemoryModel, now: Settings) -> Iterator[Settings]:
    micro = [now.micro_batch]
    while micro[-1] % 2 == 0:
        micro.append(micro[-1] // 2)
    checkpointing = sorted({now.checkpointing, *(share for share in (0.5, 1.0) if share > now.checkpointing)})
    shards = memory.machine.gpus > 1 and now.engine is not Engine.FSDP
    engines = [now.engine, Engine.FSDP] if shards else [now.engine]
    stored = [False, True] if memory.teachers and not now.stored_targets else [now.stored_targets]
    lora = [False, True] if memory.run.stage is Stage.IFT and not now.lora else [now.lora]
    for found in itertools.starmap(Settings, itertools.product(micro, checkpointing, engines, stored, lora)):
        if found != now:
            yield found


def _cost(now: Settings, other: Settings) -> float:
    """Rough slowdown, used to order the alternatives. LoRA changes what is trained, so it comes last."""
    return (
        0.03 * math.log2(now.micro_batch / other.micro_batch)
        + 0.33 * (other.checkpointing - now.checkpointing)
        + 0.10 * (other.engine != now.engine)
        + 0.05 * (other.stored_targets and not now.stored_targets)
        + 1.00 * (other.lora and not now.lora)
    )


def describe(now: Settings, other: Settings) -> str:
    """The changes from ``now`` to ``other``, written as a user sets them."""
    parts = []
    if other.micro_batch != now.micro_batch:
        parts.append(f"optimization.micro_batch={other.micro_batch}")
    if other.checkpointing > now.checkpointing:
        slower = (other.checkpointing - now.checkpointing) / 3
        parts.append(f"optimization.gradient_checkpointing={other.checkpointing:g} (about {slower:.0%} more time)")
    if other.engine != now.engine:
        parts.append(f"launch.engine={other.engine}")
    if other.stored_targets and not now.stored_targets:
        parts.append("distillation.targets=STORE (from `visper targets build`; no teacher in memory)")
    if other.lora and not now.lora:
        parts.append("'lora: {rank: 64}' (trains only low-rank updates of the LLM)")
    return ", ".join(parts)
