"""Monitors a run: throughput, time, memory, and signs of trouble such as NaN losses, spikes and dead loss terms.

One small reduction per step sums the loss over processes before the optimizer steps, so that all processes make the
same decision and stop together. Messages name the rows of the batch.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from visper.common.errors import DataError, TrainingError
from visper.config import Monitor
from visper.training.flops import FlopMeter
from visper.training.global_batch import Counts
from visper.training.parallel.fsdp import full_tensor
from visper.training.stages import part_name

logger = logging.getLogger(__name__)

DATA, TEACHER, FORWARD, BACKWARD, OPTIMIZER, REST = "data", "teacher", "forward", "backward", "optimizer", "rest"
PARTS = (DATA, TEACHER, FORWARD, BACKWARD, OPTIMIZER, REST)
"""The parts into which a step's time is divided."""
WINDOW, ENOUGH = 50, 20
"""Number of recent losses that a spike is compared with, and how many of them are needed before spikes are detected."""
SMALLEST_DEVIATION = 0.02
"""Lower bound of the deviation, relative to the median, so that a very steady loss does not spike at a ripple."""
MOST_LEFT_OUT = 5
"""Steps in a row that ``non_finite: skip`` may skip; more mean that the weights are damaged."""
UNCHANGED = 1e-6
"""Relative change below which a term counts as constant."""


class NonFiniteLossError(TrainingError):
    """The loss became NaN or infinite; the message names the rows of the batch."""


class LossSpikeError(TrainingError):
    """The loss rose far above its recent values; the message names the rows of the batch."""


class DeadTermError(TrainingError):
    """A loss term stays zero or constant; the message names it."""


class StepClock:
    """Measures the seconds that a step spends in each part.

    On a GPU, marks are events in its stream, read only in ``collect``. So marking does not wait for the device, and a
    data loader that keeps up with the GPU counts as no data time, even while the host waits for a batch.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._marks: list[tuple[str | None, Any]] = []
        self._last: Any = None

    def mark(self, part: str | None) -> None:
        """Attributes the time since the last mark to ``part``; None leaves it out of all parts."""
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((part, event))
            return
        now = time.perf_counter()
        if self._last is not None and part is not None:
            self._seconds[part] += now - self._last
        self._last = now

    def collect(self) -> dict[str, float]:
        """Seconds by part since the last call."""
        if self._marks:
            self._marks[-1][1].synchronize()
            for part, event in self._marks:
                if self._last is not None and part is not None:
                    self._seconds[part] += self._last.elapsed_time(event) / 1e3
                self._last = event
            self._marks.clear()
        seconds, self._seconds = self._seconds, dict.fromkeys(PARTS, 0.0)
        return seconds


class RunMonitor:
    """Monitors every micro-batch and step of one process.

    Args:
        peak: peak FLOPs per second of a process's device; None if unknown, then no MFU is logged.
    """

    def __init__(self, rules: Monitor, accelerator: Accelerator, peak: float | None = None) -> None:
        self.rules = rules
        self.accelerator = accelerator
        self.clock = StepClock(accelerator.device)
        self.peak = peak
        self.flops = FlopMeter()
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._history: dict[str, deque[float]] = {}
        self._dead: set[str] = set()
        self._counts = [0, 0, 0, 0, 0]  # images, tokens, pairs, supervised, image tokens on all processes since a log
        self._norms: dict[str, Tensor] = {}
        self._left_out = 0  # skipped steps in a row
        self._start_step()

    def _start_step(self) -> None:
        self._share: Tensor | None = None
        self._rows: list[str] = []
        self._terms: dict[str, Tensor] = {}

    def unlabeled(self, batches: Iterable[Mapping[str, Any]]) -> int:
        """Counts this process's rows in micro-batches without a supervised token, and keeps their names."""
        self._unlabeled = [row for batch in batches if not batch["sizes"].supervised for row in _rows_of(batch)]
        return len(self._unlabeled)

    def counted(self, counts: Counts, step: int) -> None:
        """Takes the counts over all processes for a step that is about to begin."""
        seen = (counts.images, counts.tokens, counts.pairs, counts.supervised, counts.image_tokens)
        self._counts = [before + number for before, number in zip(self._counts, seen, strict=True)]
        if counts.unlabeled and self.rules.no_labels != "ignore":
            named = gather_object(self._unlabeled)
            text = (
                f"step {step}: a micro-batch has no supervised token; rows {_some(named)}. They do not contribute to "
                "the loss: look for empty answers, or for answers cut off by data.max_tokens"
            )
            self._say(self.rules.no_labels, DataError("no labels", text), text)

    def see(self, outputs: Mapping[str, Tensor], inputs: Mapping[str, Any]) -> None:
        """Takes a micro-batch's share of the loss and its terms."""
        share = outputs["loss"].detach().float()
        self._share = share if self._share is None else self._share + share
        self._rows += _rows_of(inputs)
        self._terms = {name: term.detach() for name, term in outputs.items() if name != "loss"}

    def settle(self, step: int, norm: Tensor | float | None = None) -> bool:
        """Checks the step's loss and gradient norm before the optimizer steps. Every process decides the same.

        Both values are read together, so that the host waits for the device only once.

        Args:
            norm: norm of all gradients; None if the engine hides it.

        Returns:
            False if this step must be skipped.

        Raises:
            NonFiniteLossError: one is not finite and the rule is "stop", or too many steps in a row were skipped.
            LossSpikeError: the loss rose far above its recent values and the rule is "stop".
        """
        assert self._share is not None
        loss_sum = self.accelerator.reduce(self._share, "sum")  # NaN and infinity survive a sum
        total_norm = norm.to(loss_sum) if isinstance(norm, Tensor) else loss_sum.new_full((), norm or 0.0)
        loss, grad_norm = torch.stack([loss_sum, total_norm]).tolist()
        rows, terms = self._rows, self._terms
        self._start_step()
        if not math.isfinite(loss):
            self._leave_out(f"the loss is {loss} at step {step}", rows, terms)
            return False
        if self.rules.spike != "ignore" and self._spikes(loss):
            text = (
                f"the loss jumps to {loss:.4g} at step {step} (median of the last {len(self._losses)} steps "
                f"{statistics.median(self._losses):.4g}); rows {_some(gather_object(rows))}"
            )
            self._say(self.rules.spike, LossSpikeError(text), text)
        self._losses.append(loss)
        if not math.isfinite(grad_norm):
            self._leave_out(f"the gradient norm is {grad_norm} at step {step}, with a finite loss", rows, terms)
            return False
        self._left_out = 0
        return True

    def _leave_out(self, what: str, rows: list[str], terms: Mapping[str, Tensor]) -> None:
        self._norms.clear()
        named = gather_object([(rows, {name: round(float(term), 4) for name, term in terms.items()})])
        self._left_out += 1
        text = (
            f"{what}; terms of each process's last micro-batch {[t for _, t in named]}; "
            f"rows {_some([row for part, _ in named for row in part])}. "
            "Look at these rows, lower the learning rate, or train in float32"
        )
        if self._left_out > MOST_LEFT_OUT:
            text = (
                f"{self._left_out} steps in a row were skipped, so the weights themselves may be damaged: {text}. "
                "Then add --resume: the newest checkpoint is finite"
            )
            raise NonFiniteLossError(text)
        self._say("stop" if self.rules.non_finite == "stop" else "warn", NonFiniteLossError(text), text)

    def _spikes(self, loss: float) -> bool:
        if len(self._losses) < ENOUGH:
            return False
        median = statistics.median(self._losses)
        deviation = 1.4826 * statistics.median(abs(value - median) for value in self._losses)
        return loss - median > self.rules.spike_size * max(deviation, SMALLEST_DEVIATION * abs(median))

    def norms(self, model: nn.Module) -> None:
        """Stores the gradient norm of each part before clipping; none under engines that hide gradients."""
        parts: dict[str, list[Tensor]] = {}
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                parts.setdefault(part_name(name).split(".")[0], []).append(parameter.grad.detach())
        for part, gradients in parts.items():
            norms = [full_tensor(torch.linalg.vector_norm(gradient)) for gradient in gradients]
            self._norms[part] = torch.linalg.vector_norm(torch.stack([norm.float() for norm in norms]))

    def report(self, terms: Mapping[str, float], steps: int, step: int) -> dict[str, float]:
        """Values to log with the losses, averaged over the ``steps`` since the last log; also checks for dead terms."""
        seconds = self.clock.collect()
        total = sum(seconds.values())
        norms = torch.stack(list(self._norms.values())).tolist() if self._norms else ()
        found = {f"grad_norm_{part}": norm for part, norm in zip(self._norms, norms, strict=True)}
        self._norms.clear()
        if total > 0 and steps > 0:
            images, tokens, *others = self._counts
            found |= {"tokens_per_s": tokens / total, "images_per_s": images / total, "step_s": total / steps}
            found |= {f"time_{part}": seconds[part] / steps for part in PARTS}
            found["data_wait"] = seconds[DATA] / total
            costs = self.flops.costs
            if self.peak is not None and costs is not None and (costs.image_token is not None or not images):
                possible = self.peak * self.accelerator.num_processes * total
                found["mfu"] = costs.flops(tokens, *others) / possible
        self._counts = [0, 0, 0, 0, 0]
        found["memory_gib"] = memory_gib(self.accelerator.device)
        if self.rules.dead_term != "ignore":
            self._look_for_dead(terms, step)
        return found

    def _look_for_dead(self, terms: Mapping[str, float], step: int) -> None:
        wanted = self.rules.dead_after
        for name, value in terms.items():
            history = self._history.setdefault(name, deque(maxlen=wanted))
            history.append(value)
            spread = max(history) - min(history)
            if len(history) < wanted or spread > UNCHANGED * max(map(abs, history)):
                self._dead.discard(name)
            elif name not in self._dead:
                self._dead.add(name)
                text = (
                    f"the term '{name}' has been {value:.4g} in the last {wanted} logs up to step {step}, so it trains "
                    "nothing. Check its teacher's targets, its weight, and whether batches contain images"
                )
                self._say(self.rules.dead_term, DeadTermError(text), text)

    def _say(self, rule: str, error: Exception, text: str) -> None:
        if rule == "stop":
            raise error
        if self.accelerator.is_main_process:
            logger.warning(text)


def memory_gib(device: torch.device) -> float:
    """Peak memory in GiB so far: of the allocator on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _rows_of(batch: Mapping[str, Any]) -> list[str]:
    dropped = [f"{drop.sample_id} (dropped: {drop.reason})" for drop in batch.get("dropped", ())]
    return [*(row for row in batch.get("sample_ids", ()) if row != "none" or not dropped), *dropped]


def _some(rows: list[str], most: int = 64) -> str:
    return f"{rows[:most]}" + (f" and {len(rows) - most} more" if len(rows) > most else "")
