"""The throughput of PT's loader: images per CPU second, by what is made of each image.

640 x 480 JPEGs (generated, about 66 KB) pass through the dataset, the collator and one loader process. Measured is the
CPU time of that process and of the one that receives the batches, up to the pixels that the networks read. Teachers
have the published sizes: depth 336, seg 768, gen 224 pixels; the student's image has 336. With other jobs on the
machine a CPU second does less work, so compare only figures of the same day, relative to Pillow's rate of decoding the
same files. The last measurement sends 20 small tensors, about what a batch of PT has besides pixels, as they are and
as ``SentBatch``.

    python benchmarks/loader.py --out benchmarks/results/loader.json
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from visper.config import load_run
from visper.data.chat import ConversationEncoder
from visper.data.collator import Collator
from visper.data.dataset import ConversationDataset
from visper.data.images import build_image_processor
from visper.data.rows.records import DropList
from visper.data.rows.sources import open_records
from visper.data.sending import SentBatch
from visper.distillation.teachers import SquashedImage
from visper.model.start import starting_processor
from visper.quickstart import BASES
from visper.training.positions import PositioningCollator
from visper.training.stage_data import seen_by_student
from visper.training.stopping import start_worker

BASES_HERE = [f"student.{part}={BASES / part}" for part in ("llm", "encoder")]
MEAN, STD = (0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)
SIDES = {"depth": 336, "seg": 768, "gen": 224}
CONFIGURATIONS: dict[str, tuple[str, ...]] = {
    "student": (),
    "student, depth": ("depth",),
    "student, seg": ("seg",),
    "student, depth, seg, gen": ("depth", "seg", "gen"),
}


def write_rows(folder: Path, count: int) -> None:
    """Writes captioned images with as much detail as photographs."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).resize((640, 480))
        noise = rng.normal(0, 6, (480, 640, 3))
        name = f"{number}.jpg"
        Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8)).save(folder / name, quality=85)
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A red sphere."}]
        rows.append({"id": str(number), "image": name, "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")


def cpu_seconds() -> float:
    """CPU seconds of this process and of the ones it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


class Loading:
    """The rows of ``write_rows``, as PT reads them.

    Args:
        folder: folder of the rows.
        configuration: a key of ``CONFIGURATIONS``.
        geometry: geometry of the images.
        count: number of rows.
    """

    def __init__(self, folder: Path, configuration: str, geometry: str, count: int) -> None:
        processor = starting_processor(load_run("quickstart/pt", overrides=BASES_HERE))
        processor.image_processor = build_image_processor(geometry, 336, MEAN, STD)
        records = open_records([(folder / "rows.json", folder)], DropList(), quiet=True)
        self.dataset = ConversationDataset(records, ConversationEncoder(processor, 4096))
        self.squashed = {task: SquashedImage((SIDES[task],) * 2, MEAN, STD) for task in CONFIGURATIONS[configuration]}
        collator = Collator(0, self.squashed, as_student=seen_by_student(processor.image_processor, self.squashed))
        image_id = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
        self.collator = PositioningCollator(collator, image_id)
        self.rows = list(range(count))

    def batches(self, size: int, rows: list[int], workers: int = 1) -> DataLoader[Any]:
        """Batches of ``size`` of these rows."""
        begin = partial(start_worker, None)
        return DataLoader(
            self.dataset, size, sampler=rows, num_workers=workers, collate_fn=self.collator, worker_init_fn=begin
        )

    def receive(self, made: Any) -> None:
        """Reads only the sizes of a batch's pixels: training processes them on the device, which costs no CPU time."""
        for task, look in self.squashed.items():
            assert made["teacher_images"][task].shape[1:] == (3, *look.size)
        assert made["pixel_values"].shape[1:] == (3, 336, 336)


def measure(loading: Loading, batch: int, epochs: int) -> float:
    """Images per CPU second over ``epochs`` epochs, after subtracting the start-up, an epoch of one batch."""

    def run(rows: list[int]) -> float:
        before = cpu_seconds()
        batches = iter(loading.batches(batch, rows))
        for made in batches:
            loading.receive(made)
        del batches  # waits for the loader process, whose time counts from then on
        return cpu_seconds() - before

    start = run(loading.rows[:batch])
    taken = run(loading.rows[:batch] + loading.rows * epochs) - start
    return len(loading.rows) * epochs / taken


def decoding_rate(folder: Path) -> float:
    """Images per CPU second that Pillow decodes in this process, for comparison; the best of five rounds."""
    contents = [file.read_bytes() for file in sorted(folder.glob("*.jpg"))]
    taken = []
    for _ in range(5):
        start = time.process_time()
        for content in contents:
            Image.open(io.BytesIO(content)).load()
        taken.append(time.process_time() - start)
    return len(contents) / min(taken)


def sending_cost(collate: Callable[[Any], Any], batches: int = 150) -> float:
    """CPU milliseconds to send a batch from a loader process to this one, without start-up."""

    def run(count: int) -> float:
        before = cpu_seconds()
        for _ in DataLoader(range(count), 1, num_workers=1, collate_fn=collate):  # type: ignore[arg-type]
            pass
        return cpu_seconds() - before

    start = run(1)
    return (run(batches + 1) - start) / batches * 1000


def small_tensors(_: Any) -> dict[str, torch.Tensor]:
    """20 tensors of 16 x 60 token ids."""
    return {str(number): torch.zeros(16, 60, dtype=torch.long) for number in range(20)}


def main() -> None:
    """Prints a table, and writes it with command, machine, versions and date."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--geometry", nargs="+", default=["squash", "pad"])
    parser.add_argument("--label", default="now", help="the name of these results in --out")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        write_rows(Path(name), options.images)
        found["decoded by Pillow"] = round(decoding_rate(Path(name)), 1)
        print(f"decoded by Pillow: {found['decoded by Pillow']} images a CPU-second", flush=True)
        for geometry in options.geometry:
            for configuration in CONFIGURATIONS:
                loading = Loading(Path(name), configuration, geometry, options.images)
                rate = measure(loading, options.batch, options.epochs)
                found[f"{configuration} ({geometry})"] = round(rate, 1)
                print(f"{configuration} ({geometry}): {rate:.1f} images a CPU-second", flush=True)
    sending = {"as they are": small_tensors, "as SentBatch": lambda _: SentBatch(small_tensors(_))}
    sent = {how: round(sending_cost(collate), 2) for how, collate in sending.items()}
    print(f"20 small tensors, CPU milliseconds a batch: {sent}")
    if options.out:
        record = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {}
        record[options.label] = {
            "images_per_cpu_second": found,
            "small_tensors_ms": sent,
            "command": " ".join(["python", *sys.argv]),
            "date": date.today().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
            "load_at_the_end": [round(load, 1) for load in os.getloadavg()],
            "versions": {"python": platform.python_version()}
            | {package: version(package) for package in ("torch", "torchvision", "transformers", "pillow")},
        }
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
