"""The engine: Hugging Face's Trainer, told four things it cannot know.

Which sampler orders the rows; that the loss is a share of the *global* batch (supervised tokens and samples with an
image are counted over micro-batches and ranks before the first forward); that teachers' targets of the whole global
batch are computed and gathered first, so that the contrastive term does not depend on how the batch is split; and
that a checkpoint holds what learns, complete or not at all.
"""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from visper.config import Run
from visper.data.rows.records import Drop
from visper.distillation import Targets, Teacher, gather_targets
from visper.training.assemble import StageData
from visper.training.clock import BACKWARD, DATA, FORWARD, OPTIMIZER, REST, TEACHER
from visper.training.monitor import RunMonitor
from visper.training.parallel.deepspeed import save_zero_checkpoint
from visper.training.parallel.fsdp import gathered, is_sharded, put, whole
from visper.training.rates import parameter_groups
from visper.training.resume import write_order

WEIGHTS = "model.safetensors"
OPTIMIZER_FILE, SCHEDULER_FILE = "optimizer.pt", "scheduler.pt"
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
STAGING = ".staging"
DROPPED = "dropped.jsonl"
FORWARD_KEYS = frozenset(
    ("input_ids", "attention_mask", "labels", "pixel_values", "image_rows", "num_tokens", "num_images", "targets")
) | {"position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}


class EpochCallback(TrainerCallback):
    """Tells the sampler its epoch, also when resuming: the engine does not reach a custom sampler on every rank."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """``state.epoch`` is a float sum of step shares, hence the small push before the floor."""
        self.sampler.set_epoch(int((state.epoch or 0.0) + 1e-6))  # type: ignore[attr-defined]


class StopCallback(TrainerCallback):
    """Saves and ends training after the step in which any process was told to stop."""

    def __init__(self, trainer: StageTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The engine saves before it ends."""
        if self.trainer.stopping:
            control.should_save = control.should_training_stop = True


class OptimizerClock(TrainerCallback):
    """Marks the end of the optimizer's step."""

    def __init__(self, monitor: RunMonitor) -> None:
        self.monitor = monitor

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Behind the optimizer come the schedule, logs and checkpoints."""
        self.monitor.clock.mark(OPTIMIZER)


class StageTrainer(Trainer):
    """Trains one stage. ``teachers``: task -> frozen teacher, outside the model."""

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        data: StageData,
        run: Run,
        teachers: Mapping[str, Teacher] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.data = data
        self.run = run
        self.teachers = dict(teachers or {})
        self._terms: dict[str, Tensor] = {}
        self._terms_since = 0
        self.sharded = is_sharded(model)
        self.stop_asked = False
        self.stopping = False
        super().__init__(
            model=model,
            args=args,
            train_dataset=data.dataset,
            data_collator=data.collator,
            callbacks=[EpochCallback(data.sampler), StopCallback(self), *callbacks],
        )
        # The loss below is already a share of the global batch: the engine must not divide it again.
        self.model_accepts_loss_kwargs = True
        self.monitor = RunMonitor(run, self.accelerator)
        self.add_callback(OptimizerClock(self.monitor))
        self.loss_is_scaled_for_ga = True
        for teacher in self.teachers.values():
            teacher.to(self.args.device)
        if self.sharded:
            # Only the run's precision is left to do; a model that is prepared is not wrapped in DDP later.
            self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not self.sharded:  # shards are where they belong
            super()._move_model_to_device(model, device)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        return self.data.sampler

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor]:
        """The micro-batches of one step, each with the global counts and its targets."""
        self.monitor.clock.mark(REST)
        batches = list(itertools.islice(epoch_iterator, num_batches))
        self.monitor.clock.mark(DATA)
        tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        images = sum(len(batch["image_rows"]) for batch in batches)
        dropped = [drop for batch in batches for drop in batch.get("dropped", ())]
        # Whether one was told to stop travels along, so that all stop after the same step.
        counts = torch.tensor(
            [tokens, images, len(dropped), self.stop_asked, *self.monitor.count(batches)],
            device=device,
            dtype=torch.long,
        )
        sums = self.accelerator.reduce(counts, "sum")
        num_tokens, num_images = sums[0], sums[1]
        _, images_seen, num_dropped, stopping, num_rows, tokens_seen, unlabeled = sums.tolist()
        self.stopping = stopping > 0
        if num_dropped:
            self._note_drops(gather_object(dropped))
        if batches:
            self.monitor.counted(num_rows, tokens_seen, images_seen, unlabeled, self.state.global_step + 1)
        targets = self._targets(batches)
        self.monitor.clock.mark(TEACHER)
        for batch, own in zip(batches, targets, strict=True):
            # A step without any supervised token has a sum of zero: dividing by one keeps it zero.
            batch["num_tokens"] = num_tokens.clamp(min=1)
            batch["num_images"] = num_images.clamp(min=1)
            batch["targets"] = own
        return batches, num_tokens

    def _note_drops(self, dropped: Sequence[Drop]) -> None:
        """A row found bad while loading is named in the drop list at once; too many stop the run, on every rank."""
        self.data.drops.extend(dropped)
        if self.is_world_process_zero():
            self.data.drops.write(Path(self.run.output) / DROPPED)
        self.data.drops.check(self.data.num_rows, self.run.data.drop_limit)

    def _targets(self, batches: list[dict[str, Any]]) -> list[dict[str, Targets]]:
        """Targets of every micro-batch, against the pool of the whole global batch."""
        shares: list[dict[str, Targets]] = [{} for _ in batches]
        sizes = [len(batch["image_rows"]) for batch in batches]
        for task, teacher in self.teachers.items():
            with torch.no_grad():
                seen = [batch["teacher_images"][task] for batch in batches if len(batch["image_rows"])]
                parts = [teacher(pixels.to(self.args.device)) for pixels in seen]
            empty = torch.empty(0, teacher.spec.tokens, teacher.spec.width, device=self.args.device)
            # float32 on every rank: one without pictures cannot know what a teacher in half precision would give.
            everything = gather_targets(torch.cat(parts).float() if parts else empty)
            owns = everything.own.split(sizes)
            labels = everything.labels.split(sizes)
            for share, own, own_labels in zip(shares, owns, labels, strict=True):
                share[task] = Targets(own=own, pool=everything.pool, labels=own_labels)
        return shares

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This rank's share of the global loss times the ranks, since the engine averages gradients over them."""
        outputs = model(**{key: value for key, value in inputs.items() if key in FORWARD_KEYS})
        loss = outputs["loss"]
        self.monitor.see(outputs, inputs)
        if not self._terms:
            self._terms_since = self.state.global_step  # also the first step after a resume
        for name, term in outputs.items():
            if name != "loss":
                self._terms[name] = self._terms.get(name, torch.zeros_like(term)) + self._countable(term.detach())
        self.monitor.clock.mark(FORWARD)
        loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward; behind the last micro-batch of a step the monitor says whether it may count."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            step = self.state.global_step + 1
            if not self.monitor.settle(step):
                model.zero_grad(set_to_none=True)  # without gradients the optimizer moves nothing
            if step == 1 or step % self.args.logging_steps == 0:
                self.monitor.norms(self._bare())
        self.monitor.clock.mark(BACKWARD)
        return self._countable(loss)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Any:
        """Of all processes: up to torch 2.14 or so, the norm of sharded gradients reads as this process's alone."""
        norm = super()._get_grad_norm(model, grad_norm)
        return gathered(norm) if isinstance(norm, Tensor) else norm

    def _countable(self, value: Tensor) -> Tensor:
        """Where a step may be left out, what is not finite must not enter the sums that are logged."""
        return value if self.monitor.rules.non_finite == "stop" else value.nan_to_num(0.0, 0.0, 0.0)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The engine's AdamW; with ``optimization.lr_overrides`` in groups of one part each."""
        made: Any = getattr(self, "optimizer", None)
        if made is None and self.run.optimization.lr_overrides:
            learner = self.model if model is None else model
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, learner)
            groups = parameter_groups(self.run, self._bare(), set(self.get_decay_parameter_names(self._bare())))
            self.optimizer = kind(groups, **options)
        return super().create_optimizer(model)

    def _rates(self) -> dict[str, float]:
        optimizer: Any = getattr(self, "optimizer", None)
        groups = optimizer.param_groups if optimizer is not None else ()
        return {f"lr_{group['part']}": float(group["lr"]) for group in groups if "part" in group}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds every term, summed over ranks and averaged over the steps since the last log."""
        steps = self.state.global_step - self._terms_since
        if "loss" in logs and self._terms and steps > 0:
            names = sorted(self._terms)
            summed = self.accelerator.reduce(torch.stack([self._terms[name].float() for name in names]), "sum")
            terms = {name: value / steps for name, value in zip(names, summed.tolist(), strict=True)}
            self._terms.clear()
            logs.update(terms | self._rates() | self.monitor.report(terms, steps, self.state.global_step))
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes what learns; what is frozen comes from where the stage started. Every process must call."""
        weights = whole(self._kept().items(), keep=self.args.should_save)
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
            write_order(folder, self.data)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Unsharded and by parameter names, so that another number of processes or another engine can resume from it;
        DeepSpeed writes its own."""
        first = self.args.should_save
        if self.is_deepspeed_enabled:
            processes = self.accelerator.num_processes
            save_zero_checkpoint(self.model_wrapped, Path(output_dir), self.run.launch, processes, first)
        else:
            state = get_optimizer_state_dict(self._bare(), self._optimizer(), options=WHOLE)
            if first:
                torch.save(state, Path(output_dir) / OPTIMIZER_FILE)
        if first:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        if not self.is_deepspeed_enabled:  # transformers has let DeepSpeed load its own
            state = torch.load(Path(checkpoint) / OPTIMIZER_FILE, map_location="cpu", weights_only=True)
            set_optimizer_state_dict(self._bare(), self._optimizer(), state, options=WHOLE)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_FILE, weights_only=True))

    def _optimizer(self) -> Any:
        """torch's optimizer, or DeepSpeed's around it, without accelerate's wrapper."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def restore(self, checkpoint: str) -> None:
        """Puts the weights of ``checkpoint`` into the model without training on.

        Raises:
            ValueError: it is of another model or stage.
        """
        self._load_from_checkpoint(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        saved = load_file(Path(resume_from_checkpoint) / WEIGHTS)
        kept = self._kept()
        strange = sorted(saved.keys() ^ kept.keys())
        strange += [name for name in sorted(saved.keys() & kept.keys()) if saved[name].shape != kept[name].shape]
        if strange:
            raise ValueError(
                f"checkpoint {resume_from_checkpoint} is of another model or stage: {len(strange)} parameters differ, "
                f"first {strange[:3]}. Resume with the run that wrote it"
            )
        for name, tensor in kept.items():
            put(tensor, saved[name])

    def _kept(self) -> dict[str, Tensor]:
        """What a checkpoint holds: learning parameters, and the buffers of modules that learn (batch statistics)."""
        model = self._bare()
        learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
        saved = model.state_dict().keys()
        buffers = {
            f"{place}.{name}": buffer
            for place, module in model.named_modules()
            if any(p.requires_grad for p in module.parameters(recurse=False))
            for name, buffer in module.named_buffers(recurse=False)
            if f"{place}.{name}" in saved
        }
        return {**learning, **buffers}

    def _bare(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes the checkpoint beside its place and moves it there once whole; then prunes old ones."""
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            staging = Path(str(self.args.output_dir))
            name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            place = staging.parent / name
            if place.exists():
                shutil.rmtree(place)
            (staging / name).rename(place)
            for old in checkpoints(staging.parent)[: -self.run.logging.keep_checkpoints]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints under ``folder``, oldest first."""
    found = [(int(m.group(1)), p) for p in folder.glob("*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))]
    return [path for _, path in sorted(found)]


def is_last(checkpoint: Path) -> bool:
    """Whether no step is left to train behind ``checkpoint``."""
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    return bool(state.global_step >= state.max_steps)
