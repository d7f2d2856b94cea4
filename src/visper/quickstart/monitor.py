"""Saves the tapped layers' predictions for held-out scenes during PT."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import TrainerCallback

from visper.common.files import atomic_path
from visper.evaluation.predictions import predict_images
from visper.quickstart.language import CAPTION_PROMPTS
from visper.training import TrainingModel

PROMPT = CAPTION_PROMPTS[0]
"""Used without an answer: the predictors also read the text, and a caption would tell them what is in the image."""


class PredictionMonitor(TrainerCallback):
    """Saves predictions at chosen steps as ``step_000100.npz``: an array ``[S, N, E]`` for every ``task/layer``.

    Args:
        steps: optimizer steps after which to predict; 0 is before the first.
    """

    def __init__(self, folder: Path, images: Sequence[Image.Image], steps: Sequence[int]) -> None:
        self.folder = folder
        self.images = list(images)
        self.steps = set(steps)

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: TrainingModel, **others: Any) -> None:
        """Saves predictions after a chosen step."""
        if state.global_step not in self.steps or not state.is_world_process_zero:
            return
        mode = model.training
        model.eval()
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
            predicted = predict_images(model, self.images, PROMPT)
        model.train(mode)
        with atomic_path(self.folder / f"step_{state.global_step:06d}.npz") as partial, partial.open("wb") as file:
            arrays: dict[str, Any] = {name.replace("/", "."): value.half().numpy() for name, value in predicted.items()}
            np.savez(file, **arrays)

    on_train_begin = on_step_end


def read_predictions(folder: Path) -> dict[int, dict[str, torch.Tensor]]:
    """Reads the saved predictions by step: ``{100: {"depth/3": [S, N, E]}}``."""
    found = {}
    for file in sorted(folder.glob("step_*.npz")):
        with np.load(file) as arrays:
            values = {name.replace(".", "/"): torch.from_numpy(arrays[name]).float() for name in arrays.files}
        found[int(file.stem.removeprefix("step_"))] = values
    return found
