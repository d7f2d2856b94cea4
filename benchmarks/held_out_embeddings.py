"""How well a pre-trained student's tapped layers predict its teachers on pictures that it never saw.

For every task and layer: the cosine of predicted and true embeddings over held-out pictures, both with their mean over
the pictures taken away (what all pictures share earns nothing), beside the same with the pictures swapped. The caption
is absent: the predictors read the prompt's text only.

    python benchmarks/held_out_embeddings.py runs/photographs/pt --images photos/coco --prompt "What is in the photo?"
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from visper.config import load_run
from visper.data.images import open_image
from visper.evaluation.answers import model_inputs
from visper.model import load_student
from visper.training.assemble import build_teachers, build_training_model
from visper.training.module import TrainingModel


def load_pre_trained(output: Path) -> TrainingModel:
    """The model that PT left in ``output``, its predictors and queries included."""
    run = load_run(output / "run.yaml")
    model = build_training_model(run, load_student(output), build_teachers(run))
    model.load_state_dict(load_file(output / "distillation" / "weights.safetensors"), strict=False)
    return model.eval()


def predict(model: TrainingModel, pictures: Sequence[Image.Image], prompt: str, batch: int) -> dict[str, Tensor]:
    """``{"seg/10": [S, N, E]}`` for ``S`` pictures."""
    processor = model.processor
    parts: dict[str, list[Tensor]] = {}
    for start in range(0, len(pictures), batch):
        chosen = list(pictures[start : start + batch])
        inputs = model_inputs(processor, [prompt] * len(chosen), chosen)
        rows = torch.arange(len(chosen))
        found = model.predict(inputs["input_ids"], inputs["attention_mask"], inputs["pixel_values"], rows)
        for name, value in found.items():
            parts.setdefault(name, []).append(value)
    return {name: torch.cat(values) for name, values in parts.items()}


def centred_cosine(predicted_SNE: Tensor, target_SNE: Tensor) -> Tensor:
    """``[S]``: cosine over tokens and channels after each side's mean over the pictures is taken away."""
    predicted, target = ((values - values.mean(0)).flatten(1) for values in (predicted_SNE, target_SNE))
    return torch.cosine_similarity(predicted, target, dim=1)


def interval(values: Tensor, draws: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over pictures."""
    chosen = torch.randint(len(values), (draws, len(values)), generator=torch.Generator().manual_seed(0))
    low, high = values[chosen].mean(1).quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


def main() -> None:
    """Prints one line for every task and layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="a finished PT run's folder")
    parser.add_argument("--images", type=Path, required=True, help="folder of held-out pictures, searched through")
    parser.add_argument("--prompt", default="What is in the photo?")
    parser.add_argument("--batch", type=int, default=16)
    options = parser.parse_args()
    files = sorted(file for file in options.images.rglob("*") if file.suffix.lower() in (".jpg", ".jpeg", ".png"))
    pictures = [open_image(file) for file in files]
    model = load_pre_trained(options.output)
    predicted = predict(model, pictures, options.prompt, options.batch)
    teachers = build_teachers(load_run(options.output / "run.yaml"))
    targets = {
        task: torch.cat([teacher(teacher.preprocess(picture)[None]) for picture in pictures])
        for task, teacher in teachers.items()
    }
    print(f"{len(pictures)} pictures; centred cosine (95 % interval) | with the pictures swapped")
    for name, values in predicted.items():
        target = targets[name.split("/")[0]]
        own = centred_cosine(values, target)
        swapped = centred_cosine(values, target.roll(len(pictures) // 2, 0))
        shown = [f"{v.mean():.3f} ({interval(v)[0]:.3f} to {interval(v)[1]:.3f})" for v in (own, swapped)]
        print(f"{name:<8} {shown[0]} | {shown[1]}")


if __name__ == "__main__":
    main()
