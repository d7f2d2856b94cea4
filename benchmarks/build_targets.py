"""The throughput of the main process of `visper targets build`: images per CPU second, by dtype.

The teacher computes nothing and gives targets of the published depth teacher's shape (576 x 1024); the images are small
and decoded by a loader process. What remains is packing, checksums and writing. The CPU packs here, where a GPU would.

    python benchmarks/build_targets.py --folder /tmp/build --out benchmarks/results/build-targets.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from visper.config import Run, load_run
from visper.distillation import TargetSpec, Teacher
from visper.distillation.teachers import SquashedImage
from visper.quickstart import BASES
from visper.target_store.build import build_targets

SPEC = TargetSpec(576, 1024)
DTYPES = ("int8", "float16")
FEW = 32


class FreeTeacher(Teacher):
    """Gives every image the same target."""

    target: Tensor

    def __init__(self, model: str) -> None:
        super().__init__()
        self.spec = SPEC
        self.preprocess = SquashedImage((16, 16))
        self.register_buffer("target", torch.randn(SPEC.tokens, SPEC.width, generator=torch.Generator().manual_seed(0)))
        self.freeze()

    def encode(self, pixels: Tensor) -> Tensor:
        """``[B, 576, 1024]``."""
        return self.target.expand(len(pixels), -1, -1)


def write_rows(folder: Path, count: int) -> None:
    """Writes captioned images that all differ."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        name = f"{number}.png"
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / name)
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A red sphere."}]
        rows.append({"id": str(number), "image": name, "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")


def measure(folder: Path, dtype: str, images: int) -> float:
    """Images per CPU second of this process with all its threads, after subtracting a build of few images."""
    taken = []
    for count in (FEW, FEW, images):  # the first build also imports
        shutil.rmtree(folder, ignore_errors=True)
        write_rows(folder / "rows", count)
        run = depth_run(folder / "rows")
        before = own_seconds()
        build_targets(run, folder / "store", dtype, quiet=True)
        taken.append(own_seconds() - before)
    return (images - FEW) / (taken[2] - taken[1])


def depth_run(rows: Path) -> Run:
    """The quickstart's PT on these rows, with one task, whose teacher is ``FreeTeacher``."""
    bases = [f"student.{part}={BASES / part}" for part in ("llm", "encoder")]
    run = load_run("quickstart/pt", overrides=[*bases, "data.workers=1"]).model_dump()
    run["data"]["sources"] = [{"json": str(rows / "rows.json"), "images": str(rows)}]
    depth = run["distillation"]["tasks"]["depth"]
    teacher = {"kind": "build_targets:FreeTeacher", "model": "free"}
    run["distillation"]["tasks"] = {"depth": {**depth, "target": teacher}}
    return Run.model_validate(run)


def own_seconds() -> float:
    """CPU time of this process and its threads, without that of loader processes."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Prints one line per dtype, and writes the results with command, machine, versions and date."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="needs 1.2 MB per image while it runs")
    parser.add_argument("--images", type=int, default=544)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for dtype in DTYPES:
        found[dtype] = round(measure(options.folder / "build", dtype, options.images), 1)
        print(f"{dtype}: {found[dtype]} images per CPU second of the main process", flush=True)
    shutil.rmtree(options.folder / "build")
    if options.out:
        packages = ("torch", "safetensors", "numpy", "pillow")
        record = {
            "images_per_cpu_second": found,
            "command": " ".join(["python", *sys.argv]),
            "date": date.today().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
            "load_at_the_end": [round(load, 1) for load in os.getloadavg()],
            "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        }
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
