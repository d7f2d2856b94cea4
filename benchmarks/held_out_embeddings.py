"""Measures how well a pre-trained student's tapped layers predict its teachers on held-out images.

For every task and layer: the cosine of predicted and true embeddings over held-out images, after subtracting their
means over the images (so that what all images share does not count), beside the same with the images swapped. There is
no caption: the predictors read only the prompt's text.

    python benchmarks/held_out_embeddings.py runs/photographs/pt --images photos/coco --prompt "What is in the photo?"
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from visper.data.images import open_image
from visper.evaluation.predictions import load_pre_trained, predict_images, teacher_targets


def centered_cosine(predicted_SNE: Tensor, target_SNE: Tensor) -> Tensor:
    """``[S]``: cosine over tokens and channels after subtracting each side's mean over the images."""
    predicted, target = ((values - values.mean(0)).flatten(1) for values in (predicted_SNE, target_SNE))
    return torch.cosine_similarity(predicted, target, dim=1)


def interval(values: Tensor, draws: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over images."""
    chosen = torch.randint(len(values), (draws, len(values)), generator=torch.Generator().manual_seed(0))
    low, high = values[chosen].mean(1).quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


def main() -> None:
    """Prints one line per task and layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="a finished PT run's folder")
    parser.add_argument("--images", type=Path, required=True, help="folder of held-out images, searched recursively")
    parser.add_argument("--prompt", default="What is in the photo?")
    parser.add_argument("--batch", type=int, default=16)
    options = parser.parse_args()
    files = sorted(file for file in options.images.rglob("*") if file.suffix.lower() in (".jpg", ".jpeg", ".png"))
    images = [open_image(file) for file in files]
    found = load_pre_trained(options.output)
    predicted = predict_images(found.model, images, options.prompt, options.batch)
    targets = {task: teacher_targets(teacher, images, 1) for task, teacher in found.teachers.items()}
    print(f"{len(images)} images; centered cosine (95 % interval) | with the images swapped")
    for name, values in predicted.items():
        target = targets[name.split("/")[0]]
        own = centered_cosine(values, target)
        swapped = centered_cosine(values, target.roll(len(images) // 2, 0))
        shown = [f"{v.mean():.3f} ({interval(v)[0]:.3f} to {interval(v)[1]:.3f})" for v in (own, swapped)]
        print(f"{name:<8} {shown[0]} | {shown[1]}")


if __name__ == "__main__":
    main()
