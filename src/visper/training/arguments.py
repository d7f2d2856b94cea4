"""The Trainer's arguments for a run, and the check that the global batch can be split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from visper.common.errors import ConfigError
from visper.config import Optimization, Run
from visper.training.checkpoint import FOLDER, STAGING


def check_split(optimization: Optimization, processes: int) -> None:
    """Checks that the global batch divides evenly into micro-batches and processes.

    Raises:
        ConfigError: it does not; the message says which values would work.
    """
    batch, micro = optimization.global_batch, optimization.micro_batch
    if batch % processes:
        raise ConfigError(
            f"optimization.global_batch {batch} is not a multiple of {processes} processes: start a number of "
            f"processes that divides {batch}, or change global_batch"
        )
    if batch % (micro * processes):
        raise ConfigError(
            f"optimization.global_batch {batch} is not a multiple of micro_batch {micro} x {processes} processes: "
            f"choose a micro_batch that divides {batch // processes}"
        )


def training_arguments(
    run: Run, output: Path, world_size: int, deepspeed: dict[str, Any] | None = None
) -> TrainingArguments:
    """The Trainer's arguments for a run that passed ``check_split``; ``deepspeed`` is DeepSpeed's configuration."""
    opt = run.optimization
    on_gpu = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(output / FOLDER / STAGING),
        per_device_train_batch_size=opt.micro_batch,
        gradient_accumulation_steps=opt.global_batch // (opt.micro_batch * world_size),
        learning_rate=opt.lr,
        lr_scheduler_type=opt.schedule,
        warmup_steps=opt.warmup_ratio,  # below 1: a share of the steps
        weight_decay=opt.weight_decay,
        adam_beta1=opt.betas[0],
        adam_beta2=opt.betas[1],
        max_grad_norm=opt.max_grad_norm,
        num_train_epochs=opt.epochs,
        max_steps=opt.max_steps or -1,
        bf16=opt.precision == "bfloat16" and deepspeed is None,  # DeepSpeed's own settings turn autocast on
        use_cpu=not on_gpu and deepspeed is None,
        deepspeed=deepspeed,
        accelerator_config={"use_configured_state": deepspeed is not None, "non_blocking": on_gpu},
        optim="adamw_torch_fused",
        save_strategy="steps",
        save_steps=run.logging.save_every,
        logging_steps=run.logging.every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        # TensorBoard has a callback of its own, see ``trackers.tensorboard``.
        report_to=[name for name in run.logging.report_to if name != "tensorboard"] or "none",
        run_name=run.name,
        project=run.logging.project,
        remove_unused_columns=False,
        disable_tqdm=True,  # ``callbacks`` has a progress bar that shows the loss terms
        dataloader_num_workers=run.data.workers,
        # With persistent workers, a run would draw one random number less than a resumed run, which starts new workers.
        dataloader_persistent_workers=False,
        dataloader_pin_memory=on_gpu,
        ddp_find_unused_parameters=False,
        seed=run.seed,
        label_names=[],
    )
