"""Progress lines for work with a budget of CPU time, readable on a terminal and in a log file."""

from __future__ import annotations

import sys
import time


class Progress:
    """Counts steps until this process has used ``minutes`` of CPU time; prints about every ten seconds.

    CPU time, because a limit on wall-clock time would silently mean less training on a busy machine.
    """

    def __init__(self, name: str, minutes: float) -> None:
        self.name, self.seconds, self.steps = name, minutes * 60, 0
        self._start, self._said = time.process_time(), time.monotonic()
        self._loss = 0.0

    def share(self) -> float:
        """The share of the time that has passed, 0..1."""
        return min(1.0, (time.process_time() - self._start) / self.seconds)

    def step(self, loss: float) -> None:
        self.steps += 1
        self._loss = loss if self.steps == 1 else 0.95 * self._loss + 0.05 * loss
        if time.monotonic() - self._said > 10:
            self._said = time.monotonic()
            self.say(f"{self.share():4.0%}, step {self.steps}, loss {self._loss:.4f}")

    def say(self, text: str) -> None:
        print(f"{self.name}: {text}", file=sys.stderr, flush=True)
