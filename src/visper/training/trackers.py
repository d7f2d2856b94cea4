"""Experiment trackers: checks that they can be used, and logs images to them.

Scalars are logged by the Trainer's own callbacks, which cannot log images.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import TrainerCallback

from visper.common.errors import ConfigError


def require_trackers(names: Sequence[str], project: str) -> None:
    """Checks that the trackers of ``logging.report_to`` can be used, and sets the W&B project.

    Raises:
        ConfigError: a tracker is not installed, or W&B is not logged in; the message says what to do.
    """
    for name in names:
        if find_spec(name) is None:  # package and extra have the same name
            raise ConfigError(
                f"logging.report_to names {name}, which is not installed: pip install 'visper-lm[{name}]'"
            )
    if "wandb" in names:
        os.environ.setdefault("WANDB_PROJECT", project)  # the Trainer does not pass its project to W&B
    if "wandb" in names and os.environ.get("WANDB_MODE", "online") == "online":
        import wandb

        if wandb.api.api_key is None:
            raise ConfigError(
                "logging.report_to names wandb, which is not logged in: run `wandb login`, set WANDB_API_KEY, or log "
                "to local files with WANDB_MODE=offline"
            )


def tensorboard(folder: Path) -> TrainerCallback:
    """The Trainer's TensorBoard callback, writing to ``folder``; by default it would write into the staging folder."""
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(str(folder)))


def log_images(names: Sequence[str], images: Mapping[str, Image.Image], step: int, board: Any = None) -> None:
    """Logs images to the trackers of ``logging.report_to``. Call it in the main process only.

    Args:
        board: TensorBoard's ``SummaryWriter``; needed if ``names`` has "tensorboard".
    """
    if "tensorboard" in names:
        for name, image in images.items():
            board.add_image(name, np.asarray(image), step, dataformats="HWC")
    at = {"train/global_step": step}  # the step's name in the Trainer's callbacks
    if "wandb" in names:
        import wandb

        wandb.log({name: wandb.Image(image) for name, image in images.items()} | at)
    if "trackio" in names:
        import trackio

        trackio.log({name: trackio.Image(np.asarray(image)) for name, image in images.items()} | at)
