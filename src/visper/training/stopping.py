"""Stopping early on a signal: all processes agree on a step, save a checkpoint after it, and end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers import TrainerCallback

from visper.common.errors import StoppedError
from visper.common.parallel import end_with_parent, heed_only_parent, keep_freed_memory


class StopRequest(TrainerCallback):
    """Saves and ends training after the step in which any process was asked to stop.

    A signal sets ``asked`` on this process. The trainer sums it over processes with the counts of the next global batch
    and sets ``agreed`` on all of them, so that all stop after the same step.
    """

    def __init__(self) -> None:
        self.asked = False
        self.agreed = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Requests a line for the steps since the last log, a checkpoint and the end of training."""
        if self.agreed:
            control.should_log = control.should_save = control.should_training_stop = True

    def end_after(self, output: Path) -> None:
        """Ends the command after a stage that a signal came too late to stop. Every process must call.

        Raises:
            StoppedError: some process was told to stop; the stage in ``output`` is finished.
        """
        if any(gather_object([self.asked])):
            raise StoppedError(f"told to stop: '{output}' is finished; to go on, repeat the command")

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Sets ``asked`` on Ctrl-C and on SIGTERM, which schedulers send before they take a machine away.

        Does nothing outside the main thread, the only one in which Python can set signal handlers.
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
    """Initializes a loader worker: it ignores stop signals, which its process group gets too, to serve the last step.

    It also keeps freed memory for the next batch, and ends if the training process is killed.

    Args:
        then: the loader's own ``worker_init_fn``, which seeds the worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    heed_only_parent()
    end_with_parent()
    keep_freed_memory()
    if then is not None:
        then(worker)
