"""Finds the change of settings that makes a run fit its machine at the least cost in time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from visper.config import Engine, Stage
from visper.planning.memory import Memory, MemoryModel, Settings


@dataclass(frozen=True)
class Lever:
    """Settings that fit, the memory they need, and the changes as text."""

    settings: Settings
    memory: Memory
    changes: str


def first_lever(memory: MemoryModel, now: Settings) -> Lever | None:
    """The change with the least slowdown that makes the run fit; None if none does, or if the limit is unknown."""
    limit = memory.machine.usable
    if limit is None:
        return None
    for other in sorted(_alternatives(memory, now), key=lambda other: sum(cost for cost, _ in _changes(now, other))):
        if sum(memory.standing(other).values()) > limit:
            continue  # does not fit even without activations
        found = memory.memory(other)
        if found.total <= limit:
            return Lever(other, found, ", ".join(text for _, text in _changes(now, other)))
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


def _changes(now: Settings, other: Settings) -> Iterator[tuple[float, str]]:
    """Each change from ``now`` to ``other``: its rough slowdown, and its text as a user sets it.

    LoRA changes what is trained, so it comes last.
    """
    if other.micro_batch != now.micro_batch:
        yield 0.03 * math.log2(now.micro_batch / other.micro_batch), f"optimization.micro_batch={other.micro_batch}"
    if more := other.checkpointing - now.checkpointing:
        share = f"optimization.gradient_checkpointing={other.checkpointing:g}"
        yield 0.33 * more, f"{share} (about {more / 3:.0%} more time)"
    if other.engine != now.engine:
        yield 0.10, f"launch.engine={other.engine}"
    if other.stored_targets != now.stored_targets:
        yield 0.05, "distillation.targets=STORE (from `visper targets build`; no teacher in memory)"
    if other.lora != now.lora:
        yield 1.00, "'lora: {rank: 64}' (trains only low-rank updates of the LLM)"
