"""The run's callbacks: a console line per log, a JSONL file with every value, a progress bar, the sampler's epoch."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch.utils.data import Sampler
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from visper.common.files import naming, write_text
from visper.config import EVALUATED
from visper.training.monitor import OPTIMIZER, StepClock

FILE_WIDTH = 200
"""Maximum characters per line when the output is not a terminal."""


class JsonlCallback(TrainerCallback):
    """Appends every log to ``log.jsonl``; a resumed run first removes the lines after its checkpoint.

    Args:
        of_evaluations: further entries of the lines with held-out values.
    """

    def __init__(self, path: Path, of_evaluations: Mapping[str, str]) -> None:
        self.path = path
        self.of_evaluations = of_evaluations

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keeps the lines up to the step that training continues from."""
        if not state.is_world_process_zero or not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            # A killed run may leave a partial line; it belongs to a step that will be repeated.
            if line.endswith("}") and json.loads(line)["step"] <= state.global_step:
                kept.append(line + "\n")
        write_text(self.path, "".join(kept))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Appends one line with the step and all values."""
        if state.is_world_process_zero and logs:
            more = self.of_evaluations if any(name.startswith(EVALUATED) for name in logs) else {}
            with naming(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs, **more}) + "\n")


class LoopCallback(TrainerCallback):
    """What a stage's trainer does in the Trainer's loop.

    Args:
        sampler: its epoch is set here, also after a resume; the Trainer does not do so on every process.
        clock: gives the monitor's clock.
    """

    def __init__(self, sampler: Sampler, clock: Callable[[], StepClock]) -> None:
        self.sampler, self.clock = sampler, clock

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keeps to the intervals of the run: on a resume, the Trainer has taken those of the checkpoint."""
        state.logging_steps, state.save_steps = args.logging_steps, args.save_steps

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Adds a small epsilon before rounding down, because ``state.epoch`` is a sum of float fractions."""
        self.sampler.set_epoch(int((state.epoch or 0.0) + 1e-6))  # type: ignore[attr-defined]

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called right after the optimizer step, before the schedule, logs and checkpoints."""
        self.clock().mark(OPTIMIZER)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The last step is logged too."""
        control.should_log |= state.global_step == state.max_steps


def console_callback() -> TrainerCallback:
    """On a terminal, a progress bar with a line per log; in a file or pipe, only the lines."""
    return BarCallback() if sys.stderr.isatty() else LineCallback()


class LineCallback(TrainerCallback):
    """Prints one line per log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """``step 20/300  loss 2.13  ntp 1.80 ...``, at most ``FILE_WIDTH`` characters."""
        if state.is_world_process_zero and logs and is_shown(logs):
            print(log_line(f"step {state.global_step}/{state.max_steps}", logs, FILE_WIDTH), flush=True)


class BarCallback(ProgressCallback):
    """The Trainer's progress bar, with a short line per log instead of a printed dictionary."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """``step 20/300  loss 2.13  ntp 1.80 ...``, as much as fits on a line; ``log.jsonl`` has everything."""
        if state.is_world_process_zero and self.training_bar is not None and logs and is_shown(logs):
            width = shutil.get_terminal_size(fallback=(FILE_WIDTH, 24)).columns
            self.training_bar.write(log_line(f"step {state.global_step}/{state.max_steps}", logs, width))


FIRST = ("loss", "ntp", "grad_norm", "learning_rate", "tokens_per_s", "data_wait", "memory_gib")
"""Values that a console line shows first; the other losses follow."""
UNSEEN = ("epoch", "total_flos", "images_per_s", "step_s", "time_", "grad_norm_", "lr_")
"""Prefixes of names that the console never shows."""


def is_shown(logs: dict[str, float]) -> bool:
    """Whether the console shows a log: logs of steps and evaluations are shown, the Trainer's summary is not."""
    return "loss" in logs or any(name.startswith(EVALUATED) for name in logs)


def log_line(start: str, logs: dict[str, float], width: int) -> str:
    """One line of at most ``width`` characters, the most important values first."""
    names = [name for name in FIRST if name in logs]
    names += [name for name in logs if name not in FIRST and not name.startswith(UNSEEN)]
    line = start
    for name in names:
        part = f"  {name} {logs[name]:.4g}"
        if len(line) + len(part) > width:
            break
        line += part
    return line
