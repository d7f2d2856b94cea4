"""The Trainer's arguments for a run, and the split of the batch that they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from visper.common.errors import ConfigError
from visper.config import Optimization, Run
from visper.training.checkpoint import FOLDER, STAGING


def check_split(optimization: Optimization, processes: int) -> None:
    """Refuses a global batch that does not divide into micro-batches and processes.

    Raises:
        ConfigError: what it could be.
    """
    batch, micro = optimization.global_batch, optimization.micro_batch
    if batch % processes:
        raise ConfigError(
            f"optimization.global_batch {batch} is not a multiple of {processes} processes: start as many processes "
            f"as divide {batch}, or change the batch"
        )
    if batch % (micro * processes):
        raise ConfigError(
            f"optimization.global_batch {batch} is not a multiple of micro_batch {micro} x {processes} processes: "
            f"choose a micro_batch that divides {batch // processes}"
        )


def training_arguments(
    run: Run, output: Path, world_size: int, deepspeed: dict[str, Any] | None = None
) -> TrainingArguments:
    """The Trainer's arguments for a run whose batch divides; ``deepspeed`` holds DeepSpeed's own settings."""
    opt = run.optimization
    on_gpu = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(output / FOLDER / STAGING),
        per_device_train_batch_size=opt.micro_batch,
        gradient_accumulation_steps=opt.global_batch // (opt.micro_batch * world_size),
        learning_rate=opt.lr,
        lr_scheduler_type=opt.schedule,
        warmup_steps=0 if opt.max_steps == 1 else opt.warmup_ratio,  # rounded up: a single step would have rate 0
        weight_decay=opt.weight_decay,
        adam_beta1=opt.betas[0],
        adam_beta2=opt.betas[1],
        max_grad_norm=opt.max_grad_norm,
        num_train_epochs=opt.epochs,
        max_steps=opt.max_steps or -1,
        bf16=opt.precision == "bfloat16" and deepspeed is None,  # which has autocast among its own settings
        tf32=True if on_gpu else None,
        use_cpu=not on_gpu and deepspeed is None,
        deepspeed=deepspeed,
        accelerator_config={"use_configured_state": deepspeed is not None, "non_blocking": on_gpu},
        optim="adamw_torch_fused",
        save_strategy="steps",
        save_steps=run.logging.save_every,
        logging_steps=run.logging.every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        report_to=[name for name in run.logging.report_to if name != "tensorboard"] or "none",  # see callbacks
        run_name=run.name,
        project=run.logging.project,
        remove_unused_columns=False,
        disable_tqdm=True,  # our own bar shows the terms
        dataloader_num_workers=run.data.workers,
        # Workers that outlive an epoch would draw one number less from the random state than those of a resumed run.
        dataloader_persistent_workers=False,
        dataloader_pin_memory=on_gpu,
        ddp_find_unused_parameters=False,
        seed=run.seed,
        label_names=[],
    )
