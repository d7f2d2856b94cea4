"""The global batch of a step: its counts over all processes, and the teachers' targets for all of its images.

The loss is normalized by the counts of the global batch, and the contrastive term compares each image with all others
in it. So counts and targets must be known before the first forward pass of a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor

from visper.distillation import Targets, Teacher, gather_rows, gather_targets
from visper.target_store.open import DecodedTargets
from visper.training.module import NTP

Batch = dict[str, Any]


@dataclass(frozen=True)
class Counts:
    """Sums over the micro-batches of all processes.

    ``divisors`` are the counts that the loss is divided by, supervised tokens and images, on the device.
    """

    divisors: Tensor
    images_by_process: tuple[int, ...]
    supervised: int
    images: int
    dropped: int
    asked_to_stop: int
    unlabeled: int
    tokens: int
    image_tokens: int
    pairs: int
    save_failed: int


def count(
    batches: Sequence[Batch],
    accelerator: Accelerator,
    asked_to_stop: bool,
    unlabeled: int = 0,
    save_failed: bool = False,
) -> Counts:
    """Counts this process's micro-batches and sums over processes with a single collective.

    With one process, nothing is read from the device.

    Args:
        asked_to_stop, save_failed: whether this process was told to stop, or knows that a checkpoint could not be
            written; the sums tell every process.
        unlabeled: rows of this process in micro-batches without a supervised token.
    """
    sizes = [batch["sizes"] for batch in batches]
    supervised = sum(size.supervised for size in sizes)
    images = sum(len(batch["image_rows"]) for batch in batches)
    dropped = sum(len(batch.get("dropped", ())) for batch in batches)
    lengths = [sum(getattr(size, name) for size in sizes) for name in ("tokens", "image_tokens", "pairs")]
    by_process = [[supervised, images, dropped, int(asked_to_stop), unlabeled, *lengths, int(save_failed)]]
    if accelerator.num_processes > 1:
        own = _sent(by_process, accelerator.device)
        by_process = cast("Tensor", accelerator.gather(own)).tolist()
    sums = [sum(column) for column in zip(*by_process, strict=True)]
    # At least 1: the loss of a step without a supervised token is a sum of zero terms, and stays zero.
    divisors = _sent([max(1, number) for number in sums[:2]], accelerator.device)
    return Counts(divisors, tuple(counts[1] for counts in by_process), *sums)


def _sent(numbers: list[Any], device: torch.device) -> Tensor:
    """The numbers as a tensor on ``device``, copied without waiting for the device."""
    return torch.tensor(numbers, pin_memory=device.type == "cuda").to(device, non_blocking=True)


@torch.no_grad()
def teacher_targets(
    batches: Sequence[Batch],
    teachers: Mapping[str, Teacher],
    device: torch.device,
    images_by_process: Sequence[int] | None = None,
) -> list[dict[str, Targets]]:
    """Targets of every micro-batch by task, with the pool of the global batch. Every process must call.

    Args:
        images_by_process: images in all micro-batches of each process; None: gathered for each task.
    """
    shares: list[dict[str, Targets]] = [{} for _ in batches]
    sizes = [len(batch["image_rows"]) for batch in batches]
    same = _same_images(batches, device, images_by_process).split(sizes) if teachers and batches else ()
    for task, teacher in teachers.items():
        seen = [batch["teacher_images"][task].to(device) for batch in batches if len(batch["image_rows"])]
        if isinstance(teacher, DecodedTargets):  # gathered as stored: with int8 a quarter of float32
            empty = torch.empty(0, teacher.codec.target_bytes, dtype=torch.uint8, device=device)
            stored = torch.cat(seen) if seen else empty
            everything = gather_targets(stored, decode=teacher, counts=images_by_process)
        else:
            # float32 on every process, as one without images cannot know the precision of its teacher's output.
            empty = torch.empty(0, teacher.spec.tokens, teacher.spec.width, device=device)
            made = torch.cat([teacher(pixels).float() for pixels in seen]) if seen else empty
            everything = gather_targets(made, counts=images_by_process)
        split = zip(shares, everything.own.split(sizes), everything.labels.split(sizes), same, strict=True)
        for share, own, labels, copies in split:
            share[task] = Targets(own=own, pool=everything.pool, labels=labels, same=copies)
    return shares


def _same_images(batches: Sequence[Batch], device: torch.device, counts: Sequence[int] | None) -> Tensor:
    """``[images here, images of the global batch]``: True where both are the same image. Every process must call."""
    own = torch.cat([batch["image_ids"] for batch in batches]).to(device)
    all_ids, _ = gather_rows(own, counts=counts)
    return own[:, None] == all_ids


def prepare(
    batches: Sequence[Batch], counts: Counts, targets: Sequence[Mapping[str, Targets]], progress: float = 0.0
) -> None:
    """Adds to each micro-batch the divisors of its loss, its targets, and the fraction of steps done (``progress``)."""
    for batch, own in zip(batches, targets, strict=True):
        batch["num_tokens"], batch["num_images"] = counts.divisors
        batch["targets"] = own
        batch["progress"] = progress


class TermSums:
    """The loss terms of this process, summed since the last log."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}  # the sums before the current step
        self._since = 0
        self.skipped = 0

    def add(self, terms: Mapping[str, Tensor], step: int) -> None:
        """Adds a micro-batch's share of each term; ``step`` is the number of completed steps."""
        if not self._sums:
            self._since = step  # also the first step after a resume
        for name, term in terms.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(term)) + term

    def end_step(self, skipped: bool) -> None:
        """Keeps the terms of the current step, or removes them if the step is skipped."""
        if skipped:
            self.skipped += 1
            self._sums = {name: self._before.get(name, torch.zeros_like(term)) for name, term in self._sums.items()}
        self._before = dict(self._sums)

    def steps(self, step: int) -> int:
        """Steps completed since the first value was added, skipped ones included; 0 if there is none."""
        return step - self._since if self._sums else 0

    def means(self, accelerator: Accelerator, step: int) -> dict[str, float]:
        """Each term's mean over the steps that were not skipped, summed over processes; resets the sums.

        Empty if all steps were skipped. Every process must call.
        """
        steps, names = self.steps(step) - self.skipped, sorted(self._sums)
        sums = accelerator.reduce(torch.stack([self._sums[name].float() for name in names]), "sum")
        self._sums, self._before, self.skipped = {}, {}, 0
        return {name: value / steps for name, value in zip(names, sums.tolist(), strict=True) if steps}


class SourceSums:
    """Next-token losses of this process by data source, summed on the device since the last log.

    Args:
        names: the names of the sources, in the order of their indices.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = [f"{NTP}/{name}" for name in names]
        self._sums: Tensor | None = None
        self._before: Tensor | None = None  # the sums before the current step

    def add(self, losses_T: Tensor, sources_T: Tensor) -> None:
        """Adds the loss of each supervised token of a micro-batch to the sum of its source."""
        if self._sums is None:  # [2 (loss, tokens), sources]; float32 is too coarse for a sum over many steps
            self._sums = torch.zeros(2, len(self._names), dtype=torch.float64, device=losses_T.device)
        both = torch.stack([losses_T.double(), torch.ones_like(losses_T, dtype=torch.float64)])
        self._sums.index_add_(1, sources_T, both)

    def end_step(self, skipped: bool) -> None:
        """Keeps the losses of the current step, or removes them if the step is skipped."""
        if skipped and self._sums is not None:
            self._sums = torch.zeros_like(self._sums) if self._before is None else self._before
        self._before = None if self._sums is None else self._sums.clone()

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """``ntp/<source>``: mean over the source's supervised tokens on all processes since the last call, if any.

        Every process must call.
        """
        assert self._sums is not None
        losses, tokens = accelerator.reduce(self._sums, "sum").tolist()
        self._sums = self._before = None
        found = zip(self._names, losses, tokens, strict=True)
        return {name: loss / count for name, loss, count in found if count}
