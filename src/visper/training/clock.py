"""Where the seconds of a step go, on the device's own timeline."""

from __future__ import annotations

import time
from typing import Any

import torch

DATA, TEACHER, FORWARD, BACKWARD, OPTIMIZER, REST = "data", "teacher", "forward", "backward", "optimizer", "rest"
PARTS = (DATA, TEACHER, FORWARD, BACKWARD, OPTIMIZER, REST)


class StepClock:
    """Gives each stretch between two marks to a part.

    On a GPU the marks are events in its stream, read only when the seconds are asked for: nothing waits for the device,
    and a loader that keeps up costs no data time even though the host asked for its batch.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._marks: list[tuple[str, Any]] = []
        self._last: Any = None

    def mark(self, part: str) -> None:
        """What happened since the last mark was ``part``."""
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((part, event))
            return
        now = time.perf_counter()
        if self._last is not None:
            self._seconds[part] += now - self._last
        self._last = now

    def collect(self) -> dict[str, float]:
        """Seconds by part since the last call."""
        if self._marks:
            self._marks[-1][1].synchronize()
            for part, event in self._marks:
                if self._last is not None:
                    self._seconds[part] += self._last.elapsed_time(event) / 1e3
                self._last = event
            self._marks.clear()
        seconds, self._seconds = self._seconds, dict.fromkeys(PARTS, 0.0)
        return seconds
