"""The throughput of each kind of teacher, for single images and for batches, and the difference between their targets.

Weights are random, image sizes as published (depth 336, seg 768, gen 224, DINOv2 336, SigLIP 384). Nothing is
downloaded. Without ``--full-size`` the networks are small: ViTs 192 wide, a Swin of 32 channels and five layers.

    python benchmarks/teachers.py                                          # one CPU thread, minutes
    python benchmarks/teachers.py --full-size --batch 8 16 32 --images 64  # a GPU, bfloat16

The last column is the largest difference between the targets of batches and of single images, relative to the largest
value.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import transformers
from PIL import Image
from pretraining_step import published_teachers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    OneFormerConfig,
    OneFormerModel,
    PreTrainedModel,
    SiglipVisionConfig,
    SwinConfig,
)

from visper.distillation import Teacher, build_teacher
from visper.model.hub import known_sizes

VIT = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3}
DINO, SIGLIP = "facebook/dinov2-large", "google/siglip2-large-patch16-384"


def small_teachers(folder: Path) -> dict[str, Teacher]:
    """The three published kinds with small networks."""
    dino = Dinov2Config(**VIT, image_size=518, patch_size=14, out_indices=[3, 6, 9, 12], reshape_hidden_states=False)
    depth = DepthAnythingConfig(
        backbone_config=dino, reassemble_hidden_size=192, neck_hidden_sizes=[24, 48, 96, 192], fusion_hidden_size=32
    )
    stages = ["stage1", "stage2", "stage3", "stage4"]
    swin = SwinConfig(embed_dim=32, depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 8], image_size=224, out_features=stages)
    seg = OneFormerConfig(backbone_config=swin, is_training=False)
    gen = CLIPVisionConfig(**VIT, intermediate_size=768, image_size=224, patch_size=14, projection_dim=128)
    return {
        "depth": saved(DepthAnythingForDepthEstimation(depth), folder / "depth", "depth_anything"),
        "seg": saved(OneFormerModel(seg), folder / "seg", "oneformer"),
        "gen": saved(CLIPVisionModelWithProjection(gen), folder / "gen", "unclip"),
    }


def feature_teachers(folder: Path, full_size: bool) -> dict[str, Teacher]:
    """DINOv2 and SigLIP 2, with the sizes of the recipe or with width 192."""
    if full_size:
        dino, siglip = (AutoConfig.for_model(**known_sizes()[name]["config"]) for name in (DINO, SIGLIP))
    else:
        dino = Dinov2Config(**VIT, image_size=518, patch_size=14)
        siglip = SiglipVisionConfig(**VIT, intermediate_size=768, image_size=384, patch_size=16)
    return {
        "dino": saved(AutoModel.from_config(dino), folder / "dino", "features", size=336),
        "siglip": saved(AutoModel.from_config(siglip), folder / "siglip", "features"),
    }


def saved(model: PreTrainedModel, folder: Path, kind: str, **options: int) -> Teacher:
    """The model as a teacher, saved to a folder and loaded as in a run."""
    model.save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
    return build_teacher(kind, folder, **options)


def seconds(work: Callable[[], object], repeats: int, device: str) -> float:
    """Median seconds of ``repeats``: wall-clock time on a GPU, CPU time on a CPU."""
    taken = []
    for _ in range(repeats):
        start = now(device)
        work()
        taken.append(now(device) - start)
    return statistics.median(taken)


def now(device: str) -> float:
    """Seconds of wall-clock time; on a CPU, CPU seconds, so that other jobs do not count."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def in_batches(teacher: Teacher, pixels: Tensor, size: int) -> Tensor:
    """Targets of all images, ``size`` at a time."""
    return torch.cat([teacher(part) for part in pixels.split(size)])


def measured(teacher: Teacher, options: argparse.Namespace, device: str) -> list[str]:
    """The cells of a line: size, input, target, images per second for each batch, difference of the targets."""
    side = teacher.see([Image.new("RGB", (8, 8))]).shape[-1]
    pixels = torch.randn(options.images, 3, side, side, device=device)
    targets, rates = [], []
    for count in (1, *options.batch):
        work = partial(in_batches, teacher, pixels, count)
        targets.append(work())
        rates.append(f"{options.images / seconds(work, options.repeats, device):.2f}")
    alone = targets[0]
    apart = max(float((found - alone).abs().max()) for found in targets[1:]) / float(alone.abs().max())
    millions = sum(parameter.numel() for parameter in teacher.parameters()) / 1e6
    return [f"{millions:.1f} M", str(side), f"{teacher.spec.tokens} x {teacher.spec.width}", *rates, f"{apart:.0e}"]


def main() -> None:
    """Prints one line per teacher."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[8])
    parser.add_argument("--images", type=int, default=8, help="images per measurement; a multiple of every batch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--full-size", action="store_true", help="the published networks; needs a GPU and 10 GB of disk"
    )
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if device == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        teachers = published_teachers(folder) if options.full_size else small_teachers(folder)
        teachers |= feature_teachers(folder, options.full_size)
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU, one thread"
    size = "published" if options.full_size else "small"
    print(f"{size} networks, {machine}, {dtype}, torch {torch.__version__}, transformers {transformers.__version__}\n")
    batches = [f"in {count}s" for count in options.batch]
    print("| teacher | parameters | pixels | target | one by one |", " | ".join(batches), "| largest difference |")
    print("|---|" + "---|" * (5 + len(batches)))
    for task, teacher in teachers.items():
        print(f"| {task} |", " | ".join(measured(teacher.to(device, dtype), options, device)), "|", flush=True)
        teacher.to("cpu")


if __name__ == "__main__":
    main()
