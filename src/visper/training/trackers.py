"""The trackers that a run logs to: checked before anything is loaded, and given images.

Values reach them through the Trainer's own callbacks, which log no images.
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
    """Checks, before anything is loaded, that the trackers of ``logging.report_to`` can be used; names W&B's project.

    Raises:
        ConfigError: one is not installed, or W&B is not logged in; the message says what to do.
    """
    for name in names:
        if find_spec(name) is None:  # package and extra have one name
            raise ConfigError(
                f"logging.report_to names {name}, which is not installed: pip install 'visper-lm[{name}]'"
            )
    if "wandb" in names:
        os.environ.setdefault("WANDB_PROJECT", project)  # the Trainer passes no project on to W&B
    if "wandb" in names and os.environ.get("WANDB_MODE", "online") == "online":
        import wandb

        if wandb.api.api_key is None:
            raise ConfigError(
                "logging.report_to names wandb, which is not logged in: run `wandb login`, set WANDB_API_KEY, or keep "
                "the log on this machine with WANDB_MODE=offline"
            )


def tensorboard(folder: Path) -> TrainerCallback:
    """The Trainer's TensorBoard callback, writing beside the run: by default it writes into staging."""
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(str(folder)))


def log_images(names: Sequence[str], images: Mapping[str, Image.Image], step: int, board: Any = None) -> None:
    """Gives images to the trackers of ``logging.report_to``, in the process that logs.

    Args:
        board: the ``SummaryWriter`` of TensorBoard.
    """
    if "tensorboard" in names:
        for name, image in images.items():
            board.add_image(name, np.asarray(image), step, dataformats="HWC")
    at = {"train/global_step": step}  # as the Trainer's callbacks log a step
    if "wandb" in names:
        import wandb

        wandb.log({name: wandb.Image(image) for name, image in images.items()} | at)
    if "trackio" in names:
        import trackio

        trackio.log({name: trackio.Image(np.asarray(image)) for name, image in images.items()} | at)
