"""The gain from joining conversations about the same image: images and tokens per epoch, seconds per conversation.

    python benchmarks/joined_rows.py --out benchmarks/results/joined-rows.json

The rows are generated: 665,298 of them, 624,610 about 349,034 images, as in LLaVA-665K. Rows by directory are as
published. It is assumed that GQA, OCR-VQA and TextVQA show each image once, and that COCO's rows are spread at random
over all of its 118,287 images. Lengths are those that ``packing.py`` assumes.

Seconds are CPU seconds of one thread, for forward and backward of a small Llama with random weights. Its encoder is
tiny, so a large one would save more. Every variant uses the same micro-batches of the same conversations.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from packing import IMAGE_ID, IMAGE_TOKENS, LONGEST, TASK_TOKENS, build, step

from visper.data.collator import Batch, Collator, Sample
from visper.data.joining import JoiningCollator
from visper.data.packing import PackingCollator
from visper.data.sampler import RowSampler
from visper.training.attention import separate_samples

ROWS = {"coco": 364_100, "gqa": 72_140, "ocr_vqa": 80_000, "textvqa": 21_953, "vg": 86_417}
IMAGES = {"coco": 118_287, "gqa": 72_140, "ocr_vqa": 80_000, "textvqa": 21_953, "vg": 56_654}
TEXT_ROWS = 40_688
PREFIX = 1 + IMAGE_TOKENS + TASK_TOKENS


def generated(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each row: its group, its number of text tokens, and whether it shows an image."""
    drawn = np.random.default_rng(seed)
    found, first = [], 0
    for name, rows in ROWS.items():
        images = IMAGES[name]
        extra = drawn.integers(0, images, rows - images)
        found.append(first + np.concatenate([np.arange(images), extra]))
        first += images
    shown = np.concatenate(found)
    groups = np.concatenate([shown, first + np.arange(TEXT_ROWS)])
    has_image = np.arange(len(groups)) < len(shown)
    text = np.where(has_image, 120, 900) * np.exp(0.8 * drawn.standard_normal(len(groups)))
    most = np.where(has_image, LONGEST - PREFIX, LONGEST)
    return groups, np.clip(text, 30, most).astype(int), has_image


def sample(row: int, text: int, group: int, image: bool) -> Sample:
    """A random row; half of its text is supervised."""
    own = torch.Generator().manual_seed(row)
    ids = torch.randint(30, IMAGE_ID, (text,), generator=own).tolist()
    labels = [-100] * (text - text // 2) + ids[text - text // 2 :]
    if not image:
        return Sample(str(row), ids, labels)
    prefix = [1, *[IMAGE_ID] * IMAGE_TOKENS, *range(2, 2 + TASK_TOKENS)]
    pixels = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(group))
    return Sample(str(row), prefix + ids, [-100] * PREFIX + labels, (IMAGE_TOKENS,), pixels)


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--batch", type=int, default=128, help="conversations per step")
    parser.add_argument("--micro-batch", type=int, default=16, help="micro-batch of the measured steps")
    parser.add_argument("--micro-batches", type=int, default=4, help="measured")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    groups, text, has_image = generated()
    separate = int(text.sum() + PREFIX * has_image.sum())
    report: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "machine": f"{platform.machine()} CPU, one thread, float32, SDPA",
        "torch": torch.__version__,
        "steps_of_an_epoch": -(-len(groups) // options.batch),
        "separate": {"images": int(has_image.sum()), "tokens": separate},
        "joined": {},
    }
    orders = {}
    for micro_batch in sorted({1, 4, 8, 16, 32, 64, options.micro_batch}):
        start = time.process_time()
        sampler = RowSampler(
            len(groups), 0, global_batch=options.batch, groups=groups.tolist(), micro_batch=micro_batch
        )
        orders[micro_batch] = list(sampler)
        ordering = time.process_time() - start
        shown, read = sampler.images_read(has_image.tolist())
        images = int(read.sum())
        tokens = separate - (shown - images) * PREFIX
        found = {"images": images, "tokens": tokens, "share_of_tokens": round(tokens / separate, 4)}
        report["joined"][f"micro-batch {micro_batch}"] = found | {"seconds_to_order_an_epoch": round(ordering, 1)}
    model = build(options.width, options.layers, "sdpa")
    separate_samples(model.student.get_decoder())
    padded = Collator(0)
    variants: dict[str, Callable[[list[Sample]], Batch]] = {
        "padded": padded,
        "packed": PackingCollator(padded),
        "joined": JoiningCollator(padded, IMAGE_ID, LONGEST),
    }
    rows = orders[options.micro_batch][: options.micro_batch * options.micro_batches]
    samples = [sample(row, int(text[row]), int(groups[row]), bool(has_image[row])) for row in rows]
    cut = [samples[at : at + options.micro_batch] for at in range(0, len(samples), options.micro_batch)]
    batches = {name: [collator(own) for own in cut] for name, collator in variants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    losses: dict[str, float] = {}
    for number in range(options.rounds + 1):
        for name, made in batches.items():
            start = time.process_time()
            losses[name] = sum(step(model, batch) for batch in (made if number else made[:1]))
            if number:  # the first warms up
                seconds[name].append((time.process_time() - start) / len(samples))
    report["conversations"] = len(samples)
    report["tokens_of_them"] = {n: sum(int(b["labels"].numel()) for b in made) for n, made in batches.items()}
    report["cpu_seconds_a_conversation"] = {n: round(statistics.median(s), 4) for n, s in seconds.items()}
    report["all_rounds"] = {n: [round(each, 4) for each in s] for n, s in seconds.items()}
    report["loss"] = losses
    written = json.dumps(report, indent=1)
    print(written)
    if options.out:
        options.out.write_text(written + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
