"""Distillation in other trainers: transformers' Trainer and its subclasses, such as TRL's SFTTrainer.

    class DistilledSFTTrainer(DistillationMixin, SFTTrainer):
        pass

    trainer = DistilledSFTTrainer(model, args, train_dataset=rows, distiller=attach(model, tasks), teachers=teachers)

The teachers' input images are part of the batch. Before the first forward pass of a step, images are counted and
targets computed over all micro-batches and processes, so that terms and contrastive pool are those of the global batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, broadcast, send_to_device
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlavaProcessor, ProcessorMixin, Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from visper.data.image_places import knows_places
from visper.distillation import AttachedDistillation, Teacher
from visper.training.global_batch import TermSums, teacher_targets
from visper.training.stages import decayed_names
from visper.training.teacher_collator import SHARE, TeacherCollator

WEIGHTS = "distiller.safetensors"


class DistillationMixin(Trainer):
    """Adds the embedding losses to a Trainer: ``class Mine(DistillationMixin, SFTTrainer)``, in this order.

    Supports full fine-tuning and adapters, one process and DDP, gradient accumulation and (non-reentrant) gradient
    checkpointing. Gradients are those of the global batch, however it is split. ``max_grad_norm`` clips the gradients
    of model and distiller separately; ``grad_norm`` in the log is the model's. Every term is logged as its mean over
    the images of a step, with the number of images. Evaluation is the Trainer's own, without embedding losses.
    Checkpoints hold the distiller in ``WEIGHTS``, a file that transformers ignores.

    Rows have PIL images in a column "images" (a list) or "image", in the order in which the row's text shows them; each
    image has a target.

    Args:
        args, options: arguments of the other trainer.
        distiller: the result of ``attach(model, tasks)``, called before adapters are added to the model.
        teachers: one for each task of the distiller, except tasks whose target comes from the student itself.
        distiller_lr: learning rate of the distiller's parameters; default: the model's.

    Raises:
        ValueError: the teachers do not match the tasks, or the trainer has a setting with which the losses would be
            wrong.
    """

    data_collator: Any

    def __init__(
        self,
        *args: Any,
        distiller: AttachedDistillation,
        teachers: Mapping[str, Teacher],
        distiller_lr: float | None = None,
        **options: Any,
    ) -> None:
        _check_teachers(distiller, teachers)
        super().__init__(*args, **options)
        self.distiller = distiller.to(self.args.device)
        self.teachers = {task: teacher.to(self.args.device) for task, teacher in teachers.items()}
        self.distiller_lr = distiller_lr
        self.terms = TermSums()
        self._refuse_what_would_be_wrong()
        for parameter in self.distiller.parameters():
            broadcast(parameter.data)  # as DDP does for the model
        self.add_callback(_ClipDistiller(self))

    def get_train_dataloader(self) -> DataLoader:
        """The trainer's own loader, with the teachers' images added to its batches."""
        own = self.data_collator
        preprocess = {task: teacher.preprocess for task, teacher in self.teachers.items()}
        self.data_collator = TeacherCollator(
            own, preprocess, self.processing_class, self.distiller.image_token_id, self._by_place()
        )
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = own

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Any]:
        """The micro-batches of one step, each with its targets and the number of images in the global batch."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.distiller.zero_grad()  # the Trainer does this for the model only
        if not batches:
            return batches, num_items
        shares = [batch[SHARE] for batch in batches]
        targets = teacher_targets(shares, self.teachers, self.args.device)
        own = torch.tensor(sum(len(share["image_rows"]) for share in shares), device=self.args.device)
        images = self.accelerator.reduce(own, "sum")
        for batch, share, made in zip(batches, shares, targets, strict=True):
            layout = {name: share[name] for name in ("image_rows", "image_tokens", "places")}
            layout = send_to_device(layout, self.args.device)
            batch[SHARE] = {**layout, "targets": made, "num_images": images.clamp(min=1)}
        self.terms.add({"num_images": own}, self.state.global_step)
        return batches, num_items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The trainer's own loss and, in training, this micro-batch's share of the embedding losses."""
        share = inputs.pop(SHARE, None)
        if share is None:
            assert not model.training, "training batches must come from get_batch_samples"
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        with self.distiller.tap() as hidden:
            found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
            self._require_gradient(hidden, share)
            with self.accelerator.autocast():
                terms = self.distiller(hidden, ids, mask, **share)
        self.terms.add({name: term.detach() for name, term in terms.items()}, self.state.global_step)
        total = self.distiller.total(terms, self.state.global_step / max(1, self.state.max_steps))
        # Gradients are averaged over processes, but each process's terms are a share of a sum.
        total = total * self.accelerator.num_processes * self._divided_by(num_items_in_batch)
        loss, outputs = found if return_outputs else (found, None)
        return (loss + total, outputs) if return_outputs else loss + total

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        """The trainer's own step; after the last micro-batch, averages the distiller's gradients over processes.

        DDP cannot do this: with find_unused_parameters, which SFTTrainer sets, it considers parameters outside the
        model's forward unused, and a second DDP wrapper would reduce in a different order on each process.
        """
        loss: Tensor = super().training_step(*args, **options)
        if self.accelerator.sync_gradients and self.accelerator.num_processes > 1:
            trainable = self._trainable()
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in trainable]
            mean = self.accelerator.reduce(torch.cat([grad.flatten() for grad in grads]), "mean")
            for parameter, grad in zip(trainable, mean.split([p.numel() for p in trainable]), strict=True):
                parameter.grad = grad.view_as(parameter)
        return loss

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The names of the parameters with weight decay: the trainer's own, without the distiller's logit scales."""
        return decayed_names(super().get_decay_parameter_names(model))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The trainer's own optimizer, with parameter groups for the distiller after the model's."""
        optimizer = super().create_optimizer(model)
        trainable = self._trainable()
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if all(id(p) in known for p in trainable):
            return optimizer
        decayed = set(self.get_decay_parameter_names(self.distiller))
        named = [(name, p) for name, p in self.distiller.named_parameters() if p.requires_grad]
        rate = {} if self.distiller_lr is None else {"lr": self.distiller_lr}
        for decays in (True, False):
            group = [p for name, p in named if (name in decayed) == decays]
            if group:
                decay = self.args.weight_decay if decays else 0.0
                optimizer.add_param_group({"params": group, "weight_decay": decay, **rate})
        return optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of every term since the last log to training logs. Every process must call."""
        step = self.state.global_step
        if "loss" in logs and self.terms.steps(step):
            logs.update(self.terms.means(self.accelerator, step))
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model as the trainer does, with the distiller beside it."""
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            save_file(self.distiller.state_dict(), folder / WEIGHTS)
        super().save_model(output_dir, _internal_call)

    def train(self, resume_from_checkpoint: str | bool | None = None, **options: Any) -> Any:
        """Trains as the trainer does; a checkpoint that it loads, first or best, also sets the distiller's weights.

        Raises:
            ValueError: the checkpoint was saved without a distiller, or with other tasks.
        """
        chosen = resume_from_checkpoint
        folder = get_last_checkpoint(str(self.args.output_dir)) if chosen is True else chosen
        if folder:
            self._load(Path(folder))
        output = super().train(resume_from_checkpoint=resume_from_checkpoint, **options)
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint:
            self._load(Path(self.state.best_model_checkpoint))
        return output

    def _load(self, checkpoint: Path) -> None:
        """Loads what the Trainer does not load from a checkpoint."""
        self._load_distiller(checkpoint / WEIGHTS)
        self._load_renamed(checkpoint)

    def _load_distiller(self, file: Path) -> None:
        if not file.exists():
            raise ValueError(f"'{file}' does not exist: resume a checkpoint that was saved with the distiller")
        saved, own = load_file(file), self.distiller.state_dict()
        different = sorted(saved.keys() ^ own.keys())
        different += [name for name in sorted(saved.keys() & own.keys()) if saved[name].shape != own[name].shape]
        if different:
            raise ValueError(
                f"'{file}' belongs to other tasks: {len(different)} parameters differ, the first are {different[:3]}. "
                "Attach the tasks that it was saved with"
            )
        self.distiller.load_state_dict(saved)

    def _load_renamed(self, folder: Path) -> None:
        """Loads the model's weights from a checkpoint that uses other parameter names than the model.

        transformers saves some models (LLaVA-OneVision, Qwen2.5-VL, InternVL, Gemma 3) under the parameter names of
        older versions. Its Trainer does not translate them back (5.17 to 5.24): it would warn, resume from the
        initial weights, and end with the last instead of the best ones.
        """
        names: set[str] = set()
        for file in folder.glob("model*.safetensors"):
            with safe_open(file, "pt") as opened:
                names |= set(opened.keys())
        if names - self.model.state_dict().keys():
            saved = type(self.model).from_pretrained(folder, dtype=self.model.dtype)
            self.model.load_state_dict(saved.state_dict())

    def _by_place(self) -> bool:
        """Whether a task's targets are resampled to the image tokens by their positions in the image."""
        return any(task.by_place for task in self.distiller.objective.tasks.values())

    def _trainable(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.distiller.parameters() if parameter.requires_grad]

    def _divided_by(self, num_items_in_batch: Tensor | int | None) -> int:
        """What ``Trainer.training_step`` divides the loss by: 1 if the loss is already a share of the whole step's."""
        scaled: bool | None = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = counted or self.compute_loss_func is not None
        return 1 if scaled else int(self.current_gradient_accumulation_steps)

    def _require_gradient(self, hidden: Mapping[int, Tensor], share: Mapping[str, Any]) -> None:
        if not hidden:
            raise ValueError(
                "the distiller is attached to another model: attach the model object that is passed to the trainer"
            )
        if len(share["image_rows"]) and not any(states.requires_grad for states in hidden.values()):
            raise ValueError(
                f"no trainable parameter of the model comes before the tapped layers {sorted(hidden)}, so the "
                "embedding losses would train only their heads: unfreeze earlier parameters, or tap later layers"
            )

    def _refuse_what_would_be_wrong(self) -> None:
        args, given, processor = self.args, self.accelerator, self.processing_class
        if not isinstance(processor, ProcessorMixin):
            raise ValueError(
                f"processing_class is a {type(processor).__name__}: pass the processor of a vision-language model"
            )
        placed = not self._by_place() or isinstance(processor, LlavaProcessor) or knows_places(processor)
        plain = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
        recompute = args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
        wrong = {
            "packed or padding-free rows": getattr(args, "packing", False) or getattr(args, "padding_free", False),
            f"{given.distributed_type}": given.distributed_type not in plain,
            "a parallelism_config": getattr(given, "parallelism_config", None) is not None,
            "nn.DataParallel": args.n_gpu > 1,
            "torch_compile": args.torch_compile,
            "re-entrant gradient checkpointing": recompute,
            "dispatch_batches": args.accelerator_config.dispatch_batches,
            "label_smoothing_factor": args.label_smoothing_factor > 0,
            "compute_loss_func": self.compute_loss_func is not None,
            "model_init": self.model_init is not None,
            "an optimizer of your own (pass optimizer_cls_and_kwargs)": self.optimizer is not None,
            f"optim={args.optim}": args.optim in _STEPS_IN_BACKWARD,
            "task tokens": self.distiller.task_tokens is not None,
            "heads at image tokens (use a resampler) for this model": not placed,
        }
        refused = [name for name, is_wrong in wrong.items() if is_wrong]
        if refused:
            raise ValueError(f"distillation in this trainer does not support {', '.join(refused)}: remove these")


_STEPS_IN_BACKWARD = (
    "lomo",
    "adalomo",
    "galore_adamw_layerwise",
    "galore_adamw_8bit_layerwise",
    "galore_adafactor_layerwise",
    "apollo_adamw_layerwise",
)
"""Optimizers of the Trainer that step during the backward pass, and so never update parameters outside the model."""


class _ClipDistiller(TrainerCallback):
    """Clips the distiller's gradients after the Trainer has clipped the model's."""

    def __init__(self, trainer: DistillationMixin) -> None:
        self._trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        if args.max_grad_norm > 0:
            nn.utils.clip_grad_norm_(self._trainer.distiller.parameters(), args.max_grad_norm)


def _check_teachers(distiller: AttachedDistillation, teachers: Mapping[str, Teacher]) -> None:
    specs = {name: task.target for name, task in distiller.objective.tasks.items() if task.own is None}
    if specs.keys() != teachers.keys():
        raise ValueError(
            f"teachers {sorted(teachers)} for tasks {sorted(specs)}: pass one for each task that has a teacher"
        )
    for name, spec in specs.items():
        if teachers[name].spec != spec:
            raise ValueError(
                f"task '{name}': the teacher's target is {teachers[name].spec}, but the task's is {spec}: attach the "
                "task with its teacher's spec"
            )
