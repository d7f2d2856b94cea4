"""Evaluation while a stage trains: losses on held-out rows, answers, and the best checkpoint.

It does not affect training: it restores the random state and the model's mode and never uses the sampler, so a run ends
with the same weights with and without it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import send_to_device
from PIL import Image
from torch import Tensor
from transformers import TrainerCallback

from visper.common.console import Console, announce
from visper.common.errors import ConfigError, counted
from visper.common.files import atomic_path, write_text
from visper.common.ranks import first_decides
from visper.config import EVALUATED, Evaluation, Optimization, Run
from visper.data.checks.overlap import row_images, shared_images
from visper.data.rows.records import Drop, DropList
from visper.data.sampler import spread
from visper.distillation import Teacher
from visper.model import Student
from visper.target_store.open import TargetStore
from visper.training import global_batch
from visper.training.best import BEST, MEASURED_ON, earlier_values, measured_on
from visper.training.checkpoint import checkpoint_name
from visper.training.global_batch import SourceSums
from visper.training.module import FORWARD_KEYS, NTP, TOKEN_LOSSES, TrainingModel
from visper.training.monitor import REST
from visper.training.output import DRAWINGS
from visper.training.parallel.fsdp import reshard
from visper.training.stage_data import StageData, build_data
from visper.training.trainer import StageTrainer

Share = tuple[int, int]
"""Index of this process and number of processes that share the questions."""
Answer = Callable[[Student, Share, Callable[..., Tensor]], Mapping[str, float]]
"""Answers this process's share of the questions with the given ``generate``; returns accuracies by name, over all."""
Draw = Callable[[TrainingModel, Mapping[str, Teacher]], Mapping[str, Image.Image]]
"""Draws the tapped layers' predictions beside the live teachers' targets; returns images by name. Every process calls
it."""


@dataclass(frozen=True)
class Evaluator:
    """Functions of the ``evaluation`` package that training calls; None if the run does not use them."""

    answer: Answer | None = None
    draw: Draw | None = None
    values: Sequence[str] = ()
    """Names of the values that ``answer`` returns."""
    asked: str = ""
    """A digest of the questions, their right answers and the content of their images."""


@dataclass(frozen=True)
class HeldOut:
    """Evaluates a model in training: losses on held-out rows, answers, drawings."""

    settings: Evaluation
    optimization: Optimization
    student: Student
    rows: StageData | None = None
    evaluator: Evaluator | None = None

    def measure(self, trainer: StageTrainer) -> dict[str, float]:
        """Every held-out value by name, the same on all processes. Every process must call."""
        found: dict[str, float] = {}
        with _evaluating(trainer) as model:
            if self.rows is not None:
                found |= self._losses(trainer, model, self.rows)
            if self.evaluator is not None and self.evaluator.answer is not None:
                found |= self._accuracies(trainer, model, self.evaluator.answer)
        return {f"{EVALUATED}{name}": value for name, value in found.items()}

    def require_measure(self, model: TrainingModel) -> None:
        """Raises ConfigError if ``evaluation.best`` is not among the values that ``measure`` will return."""
        values: list[str] = []
        if self.rows is not None:
            terms = () if model.objective is None else model.objective.term_names
            order = np.array(self.measured_order(PartialState().num_processes))
            shown = set(self.rows.dataset.records.select(order).part_numbers.tolist())
            names = [name for number, name in enumerate(self.rows.dataset.source_names) if number in shown]
            values = ["loss", NTP, *(f"{NTP}/{name}" for name in names), *terms]
        if self.evaluator is not None:
            values += self.evaluator.values
        measure = self.settings.measure.removeprefix(EVALUATED)
        if measure not in values:
            raise ConfigError(
                f"evaluation.best names '{measure}', which is not measured: expected one of {', '.join(values)}"
            )

    def draw(self, trainer: StageTrainer) -> Mapping[str, Image.Image]:
        """Drawn predictions by name; empty if the run does not draw. Every process must call."""
        if self.evaluator is None or self.evaluator.draw is None:
            return {}
        with _evaluating(trainer) as model:
            return self.evaluator.draw(model, trainer.teachers)

    def _losses(self, trainer: StageTrainer, model: TrainingModel, data: StageData) -> dict[str, float]:
        """Each term's mean over batches of at most the training's global size, see ``batch_sizes``.

        The total has the tasks' full weights at every step. With a schedule's, it would fall without any improvement,
        so that later checkpoints would be the best.
        """
        accelerator, batch = trainer.accelerator, self.optimization.global_batch
        order = self.measured_order(accelerator.num_processes)
        names = data.dataset.source_names
        sources = SourceSums(names) if names else None
        sums: dict[str, Tensor] = {}
        tokens = images = dropped = 0
        for start in range(0, len(order), batch):
            own = order[start : start + batch][accelerator.process_index :: accelerator.num_processes]
            micro = self.optimization.micro_batch
            cuts = (own[at : at + micro] for at in range(0, len(own), micro))
            batches: list[Any] = [data.collator([data.dataset[row] for row in cut]) for cut in cuts]
            counts = global_batch.count(batches, accelerator, False)
            targets = global_batch.teacher_targets(
                batches, trainer.teachers, accelerator.device, counts.images_by_process
            )
            global_batch.prepare(batches, counts, targets)
            for one in batches:
                inputs = {key: value for key, value in one.items() if key in FORWARD_KEYS}
                outputs = model(**send_to_device(inputs, accelerator.device), token_losses=sources is not None)
                if sources is not None:
                    sources.add(outputs.pop(TOKEN_LOSSES), one["sources"].to(accelerator.device))
                for name, term in outputs.items():
                    count = counts.supervised if name == NTP else counts.images
                    sums[name] = sums.get(name, torch.zeros_like(term)) + term * count
            tokens, images, dropped = tokens + counts.supervised, images + counts.images, dropped + counts.dropped
        if dropped:
            text = f"the means leave out {counted(dropped, 'held-out row')} that could be read when the run began"
            announce(Console(quiet=not accelerator.is_main_process), "warning", text)
        sums.pop("loss")
        terms_of = sorted(sums)
        totals = accelerator.reduce(torch.stack([sums[name].float() for name in terms_of]), "sum")
        means = {
            name: total / max(1, tokens if name == NTP else images)
            for name, total in zip(terms_of, totals, strict=True)
        }
        terms = {name: value for name, value in means.items() if name != NTP}
        weighted = model.objective.total(terms) if model.objective is not None else 0.0
        by_source = {} if sources is None else sources.means(accelerator)
        return {
            "loss": float(means[NTP] + weighted),
            **{name: float(value) for name, value in means.items()},
            **by_source,
        }

    def measured_order(self, processes: int) -> list[int]:
        """The rows of ``rows`` that are measured, evenly spaced; their number is a multiple of the number of processes.

        Raises:
            ConfigError: there are fewer rows than processes.
        """
        order = [] if self.rows is None else spread(range(len(self.rows.dataset)), self.settings.limit)
        if self.rows is not None and len(order) < processes:
            raise ConfigError(
                f"evaluation.loss_on and evaluation.limit leave {len(order)} rows to measure, fewer than the "
                f"{processes} processes that train: each needs at least one"
            )
        return order[: len(order) - len(order) % processes]

    def measured_on(self, processes: int) -> str:
        """A digest of what ``evaluation.best`` is measured on, see ``best.measured_on``."""
        records = None if self.rows is None else self.rows.dataset.records
        asked = "" if self.evaluator is None else self.evaluator.asked
        return measured_on(self.settings, records, self.measured_order(processes), asked)

    def _accuracies(self, trainer: StageTrainer, model: TrainingModel, answer: Answer) -> dict[str, float]:
        accelerator = trainer.accelerator
        # Processes gather sharded weights in lockstep, so with sharding every process answers all questions.
        share = (0, 1) if trainer.sharded else (accelerator.process_index, accelerator.num_processes)
        return dict(answer(self.student, share, model.generate))


@contextmanager
def _evaluating(trainer: StageTrainer) -> Iterator[TrainingModel]:
    """The model in evaluation mode and training precision; mode and random state are restored afterwards."""
    model: TrainingModel = trainer.accelerator.unwrap_model(trainer.model)
    was_training = model.training
    model.eval()
    device, half = trainer.args.device, trainer.optimization.precision == "bfloat16"
    devices = [device] if device.type == "cuda" else []
    # Accelerate's autocast wraps the model's forward alone, not generate and predict.
    precision = torch.autocast(device.type, torch.bfloat16, enabled=half)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices), precision:
            yield model
    finally:
        model.train(was_training)
        reshard(model)


class EvaluationCallback(TrainerCallback):
    """Evaluates every ``evaluation.every`` steps and after the last, logs the values, and keeps the best checkpoint.

    Args:
        on: ``held_out.measured_on``, the same on all processes.

    Attributes:
        trainer, log_images: set by the caller after construction; ``log_images`` takes images by name, and the step.
    """

    trainer: StageTrainer
    log_images: Callable[[Mapping[str, Image.Image], int], None]

    def __init__(self, held_out: HeldOut, output: Path, on: str) -> None:
        self.held_out = held_out
        self.output = output
        self.on = on
        self._best: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restores the best value so far from the log, up to the step that training continues from.

        Considers existing checkpoints only: if ``best`` named another measure before, others were kept. Values measured
        on other rows or questions are left out.
        """
        self.held_out.require_measure(self.trainer.accelerator.unwrap_model(self.trainer.model))
        measure, others = self.held_out.settings.measure, 0
        # Read by the first process, whose own callback has already cut off a line that a power failure left torn.
        for value, step, on in first_decides(lambda: [*earlier_values(self.output, measure, state.global_step)]):
            if on == self.on:
                self._take(value, step)
            else:
                others += 1
        if others:
            announce(
                Console(quiet=not self.trainer.is_world_process_zero()),
                "evaluation",
                f"{counted(others, 'checkpoint')} evaluated on other rows or questions than these: the best one is "
                "chosen among new evaluations",
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluates when due; the checkpoint of a new best value is written in the same step."""
        settings = self.held_out.settings
        if state.global_step % settings.every and state.global_step != state.max_steps:
            return
        clock = self.trainer.monitor.clock
        clock.mark(REST)
        values = self.held_out.measure(self.trainer)
        due = control.should_log
        self.trainer.log(dict(values))
        control.should_log = due  # logging clears it, which would suppress the step's own log line
        self._draw(state.global_step)
        clock.mark(None)  # otherwise the next line's throughput is that of training and evaluation
        if self._take(values[settings.measure], state.global_step):
            control.should_save = True

    def _draw(self, step: int) -> None:
        images = self.held_out.draw(self.trainer)
        if not self.trainer.is_world_process_zero():
            return
        for name, image in images.items():
            with atomic_path(self.output / DRAWINGS / f"step_{step:06d}" / f"{name}.png") as partial:
                image.save(partial, "PNG")
        if images:
            self.log_images({f"{DRAWINGS}/{name}": image for name, image in images.items()}, step)

    def _take(self, value: float, step: int) -> bool:
        """Whether the value is the best so far; if so, records it in ``best.json``."""
        if not math.isfinite(value):
            return False
        sign = 1 if self.held_out.settings.higher_is_better else -1
        if self._best is not None and not sign * value > sign * self._best:
            return False
        self._best, self.trainer.best_checkpoint = value, checkpoint_name(step)
        if self.trainer.is_world_process_zero():
            best = {"measure": self.held_out.settings.measure, "value": value, "step": step}
            best |= {"checkpoint": checkpoint_name(step), MEASURED_ON: self.on}
            write_text(self.output / BEST, json.dumps(best, indent=1))
        return True


def require_evaluator(evaluation: Evaluation | None, evaluator: Evaluator | None) -> None:
    """Checks that there is an evaluator if the run asks questions or draws predictions.

    Raises:
        ConfigError: there is none; the message says what to pass to ``run_stage``.
    """
    if evaluator is None and evaluation is not None and (evaluation.asks or evaluation.draw):
        raise ConfigError(
            "'evaluation' asks questions or draws predictions, which needs an evaluator: pass "
            "evaluator=visper.evaluation.while_training.evaluator_of(run) to run_stage"
        )


def held_out_rows(
    run: Run,
    student: Student,
    teachers: Mapping[str, Teacher],
    targets: TargetStore | None,
    trained: StageData,
    console: Console,
) -> StageData | None:
    """The rows of ``loss_on``, read like the run's own, or None. Warns if the run also trains on their images."""
    settings = run.evaluation
    if settings is None or not settings.loss_on:
        return None
    plain = {"sources": settings.loss_on, "group_by_length": False, "join_conversations": False, "drop_list": ()}
    held_out = run.model_copy(update={"data": run.data.model_copy(update=plain)})
    rows = build_data(held_out, student, teachers, targets, Console(quiet=True))
    _leave_out_unreadable(rows, settings.limit, console)
    _announce_rows(rows, settings, run.optimization.global_batch, console)
    if PartialState().is_main_process:
        _warn_of_shared(rows, trained, settings.limit, console)
    return rows


def _leave_out_unreadable(rows: StageData, limit: int, console: Console) -> None:
    """Leaves out the rows to measure that cannot be read: otherwise they would be missing from every mean.

    Raises:
        DataError: they are more than ``data.drop_limit`` of the rows to measure.
    """
    records = rows.dataset.records
    order = spread(range(len(records)), limit)
    read = ((row, rows.dataset[row]) for row in order)
    bad = first_decides(lambda: {row: drop for row, drop in read if isinstance(drop, Drop)})
    if not bad:
        return
    drops = DropList(bad.values())
    drops.check(len(order), rows.drop_limit)
    rows.dataset.records = records.select(np.array([row for row in order if row not in bad]))
    announce(console, "warning", f"left out {counted(len(bad), 'held-out row')}: {drops.counts()}")


def batch_sizes(rows: int, batch: int) -> list[int]:
    """The numbers of rows that a contrastive term compares: full global batches, then the rest."""
    return [min(batch, rows - start) for start in range(0, rows, batch)]


def _announce_rows(rows: StageData, settings: Evaluation, batch: int, console: Console) -> None:
    """Says how many rows are measured and, if they are not full global batches, in what batches they are compared."""
    count = min(settings.limit, len(rows.dataset))
    count -= count % PartialState().num_processes  # see ``measured_order``
    sizes = batch_sizes(count, batch) or [batch]
    text = f"losses on {count} held-out rows"
    if sizes[-1] != batch:
        parts = f"{len(sizes) - 1} x {batch} and {sizes[-1]}" if len(sizes) > 1 else str(count)
        text += f", in batches of {parts}: info_nce is not comparable with the training's, over {batch} rows"
    announce(console, "evaluation", text)


def _warn_of_shared(rows: StageData, trained: StageData, limit: int, console: Console) -> None:
    """Warns of images of the measured held-out rows that the run also trains on, whatever their names."""
    held_out, many = rows.dataset.records, trained.dataset.records
    shared = shared_images(row_images(held_out, spread(range(len(held_out)), limit)), many)
    if shared:
        name, same = next(iter(shared.values()))
        text = f"the run trains on {counted(len(shared), 'image')} of the held-out rows, such as {name} ({same})"
        announce(console, "warning", text)
