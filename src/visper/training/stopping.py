"""Stopping early: a signal asks, all processes agree, and the run saves a checkpoint after the current step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

from visper.common.parallel import keep_freed_memory


class StopRequest(TrainerCallback):
    """Saves and ends training after the step in which any process was asked to stop.

    ``asked`` is set on this process; the trainer sums it over processes with the counts of the next global batch and
    sets ``agreed`` on all of them, so that all stop after the same step.
    """

    def __init__(self) -> None:
        self.asked = False
        self.agreed = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The trainer saves before it ends."""
        if self.agreed:
            control.should_save = control.should_training_stop = True

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Asks on SIGTERM, which schedulers send before they take a machine away, and on Ctrl-C.

        Python handles signals in the main thread only: in any other, nothing changes.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(signum: int, frame: Any) -> None:
            self.asked = True

        before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def start_worker(then: Callable[[int], None] | None, worker: int) -> None:
    """Makes a loader process ignore the signals that its process group gets too: it must serve the last step.

    It also keeps the memory of a batch for the next.

    Args:
        then: the loader's own start of a worker, which seeds it.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keep_freed_memory()
    if then is not None:
        then(worker)
