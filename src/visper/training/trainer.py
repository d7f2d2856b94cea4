"""Hugging Face's Trainer, adapted to this package.

Changed are the sampler, the scaling of the loss (a share of the global batch), the logged terms, the monitoring of each
step, and what checkpoints hold and how they are written.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from visper.common.ranks import wait_for_all
from visper.config import Engine, Run, save_run
from visper.distillation import Teacher
from visper.training import checkpoint, global_batch
from visper.training.callbacks import LoopCallback
from visper.training.checkpoint_writer import CheckpointWriter
from visper.training.flops import can_count, known_peak
from visper.training.global_batch import SourceSums, TermSums
from visper.training.module import FORWARD_KEYS, TOKEN_LOSSES, TrainingModel
from visper.training.monitor import BACKWARD, DATA, FORWARD, REST, TEACHER, RunMonitor
from visper.training.output import DROPPED, RUN
from visper.training.parallel.deepspeed import save_zero_checkpoint
from visper.training.parallel.fsdp import choose_reduction, full_tensor, full_tensors, is_sharded
from visper.training.resume import write_order
from visper.training.stage_data import StageData
from visper.training.stages import decayed_names, parameter_groups
from visper.training.stopping import StopRequest, start_worker


class StageTrainer(Trainer):
    """Trains one stage.

    Args:
        model: moved to the device and wrapped here, unless it is sharded already.
        teachers: task -> frozen teacher; outside the model, so they are in no optimizer and no checkpoint.
    """

    def __init__(
        self,
        model: TrainingModel,
        args: TrainingArguments,
        data: StageData,
        teachers: Mapping[str, Teacher],
        run: Run,
        callbacks: Sequence[TrainerCallback],
    ) -> None:
        self.data = data
        self.teachers = dict(teachers)
        self.run, self.optimization, self.launch, self.output = run, run.optimization, run.launch, Path(run.output)
        self.stop = StopRequest()
        self.terms = TermSums()
        names = data.dataset.source_names
        self.sources = SourceSums(names) if names else None
        self.rates: dict[str, float] = {}
        self.best_checkpoint: str | None = None  # kept in addition to the newest ones, see ``held_out``
        self.sharded = is_sharded(model)
        super().__init__(
            model=model,
            args=args,
            train_dataset=data.dataset,
            data_collator=model.with_positions(data.collator),
            callbacks=[LoopCallback(data.sampler, lambda: self.monitor.clock), self.stop, *callbacks],
        )
        # The loss below is already a share of the global batch: the Trainer must not divide it again.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        timeout, keep = timedelta(minutes=run.launch.timeout_minutes), run.logging.keep_checkpoints
        self.writer = CheckpointWriter(self.output, keep, self.is_world_process_zero(), timeout)
        peak = known_peak(self.accelerator.device)
        counted = peak is not None and can_count(model.student.get_decoder())
        self.monitor = RunMonitor(run.logging.monitor, self.accelerator, peak if counted else None)
        for teacher in self.teachers.values():
            teacher.to(self.args.device)
        if self.sharded:
            # This only sets up autocast; the Trainer does not wrap a prepared model in DDP.
            self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not self.sharded:  # shards are on their device already
            super()._move_model_to_device(model, device)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        return self.data.sampler

    def get_train_dataloader(self) -> DataLoader:
        """The Trainer's loader, with workers that survive a signal to the process group."""
        loader: Any = super().get_train_dataloader()
        inner = getattr(loader, "base_dataloader", loader)  # inside accelerate's wrapper
        inner.worker_init_fn = partial(start_worker, inner.worker_init_fn)
        return loader

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor]:
        """The micro-batches of one step, each with the divisors of its loss and its targets."""
        self.monitor.clock.mark(REST)
        batches = list(itertools.islice(epoch_iterator, num_batches))
        self.monitor.clock.mark(DATA)
        counts = global_batch.count(
            batches, self.accelerator, self.stop.asked, self.monitor.unlabeled(batches), self.writer.failed()
        )
        if counts.save_failed:
            self.writer.wait()
        self.stop.agreed = counts.asked_to_stop > 0
        if counts.dropped:
            dropped = gather_object([drop for batch in batches for drop in batch.get("dropped", ())])
            self.data.drop_more(dropped, self.output / DROPPED if self.is_world_process_zero() else None)
        if batches:
            self.monitor.counted(counts, self.state.global_step + 1)
        targets = global_batch.teacher_targets(batches, self.teachers, self.args.device, counts.images_by_process)
        self.monitor.clock.mark(TEACHER)
        progress = self.state.global_step / max(1, self.state.max_steps)
        global_batch.prepare(batches, counts, targets, progress)
        return batches, counts.divisors[0]

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        """This process's share of the global loss times the number of processes, because gradients are averaged."""
        given = {key: value for key, value in inputs.items() if key in FORWARD_KEYS}
        with self._counting(inputs):
            outputs = model(**given, token_losses=self.sources is not None)
        if self.sources is not None:
            self.sources.add(outputs.pop(TOKEN_LOSSES), inputs["sources"])
        self.monitor.see(outputs, inputs)
        terms = {name: term.detach() for name, term in outputs.items() if name != "loss" or self._skips}
        self.terms.add(terms, self.state.global_step)
        self.monitor.clock.mark(FORWARD)
        loss = outputs["loss"] * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _counting(self, inputs: Mapping[str, Any]) -> AbstractContextManager[None]:
        if self.monitor.peak is None:
            return nullcontext()
        return self.monitor.flops.watch(
            cast("TrainingModel", self._bare()), inputs["input_ids"].numel(), inputs["sizes"]
        )

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Runs forward and backward; after a logged step's last micro-batch, also computes gradient norms by part."""
        if self.sharded and self.launch.engine is Engine.FSDP:
            choose_reduction(self._bare(), self.accelerator.sync_gradients, self.launch.reduce_once)
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            step = self.state.global_step + 1
            if step in (1, self.state.max_steps) or step % self.args.logging_steps == 0:
                self.monitor.norms(self._bare())
        self.monitor.clock.mark(BACKWARD)
        return loss.nan_to_num(0.0, 0.0, 0.0) if self._skips else loss  # the Trainer's own sum would stay NaN

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Any:
        """The gradient norm over all processes; 0 if the monitor skips the step.

        Until about torch 2.14, the norm of sharded gradients covers only this process's shards, hence ``full_tensor``.
        The Trainer calls this right before the optimizer step, so the monitor checks loss and gradient norm here. With
        one process, this is the only time in a step that the host waits for its device. The rates to be logged are read
        here too: when the Trainer logs, they are already those of the next step.
        """
        self.rates = {f"lr_{own['part']}": float(own["lr"]) for own in self.optimizer.param_groups if "part" in own}
        norm = super()._get_grad_norm(model, grad_norm)
        norm = full_tensor(norm) if isinstance(norm, Tensor) else norm
        skipped = not self.monitor.settle(self.state.global_step + 1, norm)
        if self._skips:
            for sums in (self.terms, self.sources):
                if sums is not None:
                    sums.end_step(skipped)
        if skipped:
            model.zero_grad(set_to_none=True)  # without gradients, the optimizer step changes nothing
            return 0.0
        return norm

    @property
    def _skips(self) -> bool:
        """Whether steps that are not finite are skipped. Logged values are then means over the other steps."""
        return self.monitor.rules.non_finite == "skip"

    def _logged_terms(self, logs: dict[str, float], step: int) -> dict[str, float]:
        """The means of all terms; the Trainer's loss in ``logs`` counts skipped steps, so it is replaced or removed."""
        skipped = self.terms.skipped
        terms = self.terms.means(self.accelerator, step)
        loss = terms.pop("loss", None)
        if skipped:
            logs["skipped"] = skipped
            del logs["loss"]
            if loss is not None:
                logs["loss"] = loss
        return terms

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The names of the parameters with weight decay: those of the Trainer, without the logit scales."""
        return decayed_names(super().get_decay_parameter_names(model))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's AdamW; with ``optimization.lr_overrides``, its parameter groups are those of the parts."""
        made: Any = getattr(self, "optimizer", None)
        if made is None and self.optimization.lr_overrides:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model if model is None else model)
            decayed = set(self.get_decay_parameter_names(self._bare()))
            self.optimizer = kind(parameter_groups(self.optimization, self._bare(), decayed), **options)
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """The Trainer's, without warmup in a run of one step: warmup is rounded up, and begins with a rate of 0."""
        if num_training_steps == 1:
            self.args.warmup_steps = 0
        return super().create_scheduler(num_training_steps, optimizer)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds every term (summed over processes, averaged over the steps since the last log) and monitoring values."""
        if self._skips:
            logs.pop("train_loss", None)  # the Trainer's mean over the run, in which a skipped loss counts as 0
        step = self.state.global_step
        steps = self.terms.steps(step)
        if "loss" in logs and steps > 0:
            terms = self._logged_terms(logs, step)
            logs.update(terms | self.rates | self.monitor.report(terms, steps, step))
            if self.sources is not None:
                logs.update(self.sources.means(self.accelerator))
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the run, the order of its rows and the dropped ones.

        The Trainer calls this first when it saves a checkpoint, then ``_save_optimizer_and_scheduler``, which writes
        the tensors.
        """
        folder = Path(output_dir or str(self.args.output_dir))
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            write_order(folder, self.data)
            self.data.drops.write(folder / DROPPED)
            save_run(self.run, folder / RUN)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        folder, first = Path(output_dir), self.args.should_save
        if self.is_deepspeed_enabled:
            save_zero_checkpoint(self.model_wrapped, folder, self.launch, self.accelerator.num_processes, first)
            weights = full_tensors(checkpoint.trainable_state(self._bare()).items(), keep=first)
            self.writer.write({"weights": weights}, folder)
        else:
            self.writer.write(checkpoint.state_of(self._bare(), self._optimizer()), folder)
        if first:
            checkpoint.save_scheduler(self.lr_scheduler, folder)

    def _load_optimizer_and_scheduler(self, folder: str | None) -> None:
        if folder is None:
            return
        if not self.is_deepspeed_enabled:  # DeepSpeed has already loaded its own state
            checkpoint.load_optimizer(self._bare(), self._optimizer(), Path(folder))
        checkpoint.load_scheduler(self.lr_scheduler, self._optimizer(), Path(folder))

    def _optimizer(self) -> Any:
        """The optimizer without accelerate's wrapper: torch's, or DeepSpeed's."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        checkpoint.load_weights(self._bare(), Path(resume_from_checkpoint))

    def restore(self, folder: Path) -> None:
        """Reads the weights of a checkpoint into the model, without continuing to train.

        Raises:
            ConfigError: the checkpoint belongs to another model or stage.
        """
        checkpoint.load_weights(self._bare(), folder)

    def _bare(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Starts writing a checkpoint, which is moved to its place once complete.

        Raises:
            TrainingError: a weight is not finite, or the previous checkpoint could not be written; older ones are kept.
        """
        self.writer.wait()
        checkpoint.require_finite(self._bare(), self.accelerator)
        super()._save_checkpoint(model, trial)
        wait_for_all()
        self.writer.complete(checkpoint.checkpoint_name(self.state.global_step), self.best_checkpoint)
