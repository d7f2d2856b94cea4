"""The gain from packing in IFT: the same steps over rows of mixed length, padded, grouped by length, and packed.

    python benchmarks/packing.py --out benchmarks/results/packing.json

Weights and rows are random. Lengths: 94 % of the rows show an image (600 tokens with the task tokens) and have text of
lognormal length (median 120 tokens, sigma 0.8); 6 % are only text (median 900, sigma 0.8); none is above 2,048. This
is an assumption about LLaVA-665K, not a measurement. Each variant uses the same rows in steps of ``--batch``; times
are CPU seconds of one thread; the variants run in turn, several times.
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

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from visper.config import Stage
from visper.data.collator import Batch, Collator, Sample
from visper.data.packing import PackingCollator
from visper.data.sampler import RowSampler
from visper.model import Student
from visper.training.attention import separate_samples
from visper.training.module import FORWARD_KEYS, TrainingModel
from visper.training.stages import TASK_TOKEN_PARTS, apply_stage

IMAGE_TOKENS, TASK_TOKENS, LONGEST = 576, 24, 2048
IMAGE_ID = 999


def lengths(rows: int, seed: int) -> tuple[list[int], list[bool]]:
    """For each row: its number of tokens, and whether it shows an image."""
    generator = torch.Generator().manual_seed(seed)
    has_image = torch.rand(rows, generator=generator) < 0.94
    spread = torch.exp(0.8 * torch.randn(rows, generator=generator))
    text = torch.where(has_image, 120 * spread, 900 * spread).clamp(min=30)
    whole = (text + has_image * (IMAGE_TOKENS + TASK_TOKENS)).clamp(max=LONGEST)
    return whole.int().tolist(), has_image.tolist()


def sample(number: int, length: int, image: bool) -> Sample:
    """A random row; half of its text is supervised."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(1, IMAGE_ID, (length,), generator=generator).tolist()
    text = length
    if image:
        ids[1 : 1 + IMAGE_TOKENS] = [IMAGE_ID] * IMAGE_TOKENS
        text -= IMAGE_TOKENS + TASK_TOKENS
    labels = [-100] * (length - text // 2) + ids[length - text // 2 :]
    pixels = torch.randn(1, 3, 48, 48, generator=generator) if image else None
    return Sample(str(number), ids, labels, (IMAGE_TOKENS,) if image else (), pixels)


def build(width: int, layers: int, attention: str) -> TrainingModel:
    """A Llama-like student in which the parameters that IFT trains require gradients."""
    torch.manual_seed(0)
    llm = LlamaConfig(
        vocab_size=IMAGE_ID + 1,
        hidden_size=width,
        intermediate_size=int(3.5 * width),
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 128 or 1,
    )
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=48, patch_size=2
    )
    config = LlavaConfig(text_config=llm, vision_config=vision, image_token_index=IMAGE_ID)
    config._attn_implementation = attention
    model = TrainingModel(Student(LlavaForConditionalGeneration._from_config(config), None, {}))
    apply_stage(model, Stage.IFT, TASK_TOKEN_PARTS)
    model.recompute_activations()
    return model.train()


def step(model: TrainingModel, batch: Batch) -> float:
    """Forward and backward; returns the loss."""
    given: dict[str, Any] = {key: batch[key] for key in FORWARD_KEYS if key in batch}  # type: ignore[literal-required]
    tokens = int((batch["labels"][:, 1:] != -100).sum())
    loss = model(**given, num_tokens=tokens)["loss"]
    loss.backward()
    model.zero_grad(set_to_none=True)
    return float(loss.detach())


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = build(options.width, options.layers, "sdpa")
    separate_samples(model.student.model.language_model)  # padded batches stay unchanged
    sizes, has_image = lengths(options.batch * 50, 0)
    padded = Collator(0)
    variants: dict[str, tuple[list[int] | None, Callable[[list[Sample]], Batch]]] = {
        "padded": (None, padded),
        "packed": (None, PackingCollator(padded)),
        "grouped": (sizes, padded),
        "grouped, packed": (sizes, PackingCollator(padded)),
    }
    batches: dict[str, list[Batch]] = {}
    shares: dict[str, float] = {}
    for name, (by_length, collator) in variants.items():
        sampler = RowSampler(len(sizes), 0, by_length, has_image if by_length else None, options.batch)
        order = list(sampler)
        cut = [order[i : i + options.batch] for i in range(0, len(order), options.batch)]
        made = [collator([sample(i, sizes[i], has_image[i]) for i in rows]) for rows in cut]
        shares[name] = 1 - sum(int(b["attention_mask"].sum()) for b in made) / sum(b["labels"].numel() for b in made)
        batches[name] = made[: options.steps]
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    losses: dict[str, float] = {}
    for round_ in range(options.rounds + 1):
        for name, made in batches.items():
            start = time.process_time()
            losses[name] = sum(step(model, batch) for batch in (made if round_ else made[:1]))
            real = sum(int(batch["attention_mask"].sum()) for batch in made)
            if round_:  # the first warms up
                seconds[name].append((time.process_time() - start) / real * 1000)
    report = {
        "command": " ".join(["python", *sys.argv]),
        "machine": f"{platform.machine()} CPU, one thread, float32, SDPA",
        "torch": torch.__version__,
        "mean_tokens": statistics.mean(sizes),
        "padding_share": {name: round(share, 4) for name, share in shares.items()},
        "cpu_seconds_per_1000_real_tokens": {n: round(statistics.median(s), 4) for n, s in seconds.items()},
        "loss_of_the_same_rows": {name: losses[name] for name in ("padded", "packed")},
    }
    text = json.dumps(report, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
