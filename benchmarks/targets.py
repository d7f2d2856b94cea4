"""A target store: the time of a random read, and the effect of eight bits on the losses.

Losses use teachers on real images. A prediction is the target plus noise, given as a share of each channel's standard
deviation: 1.0 represents an early stage of training, 0.1 a later one than any run has reached. The "large channels"
case is normal noise of DINOv2's shape, in which one channel in a hundred is twenty times as large.

    python benchmarks/targets.py --folder /tmp/targets --photos photos/flickr --onnx models/deeplab_v3.onnx
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visper.data.images import open_image
from visper.distillation import TargetSpec, Teacher, build_teacher
from visper.distillation.losses import info_nce, smooth_l1
from visper.quickstart import BASES
from visper.target_store import quantize
from visper.target_store.fingerprint import Fingerprint
from visper.target_store.quantize import DTYPES, LARGEST, TargetCodec
from visper.target_store.store import StoredTeacher, TaskTargets, write_part

TOWER = "visper.quickstart.tower:TowerTeacher"

PUBLISHED = {"depth": TargetSpec(576, 1024), "seg": TargetSpec(576, 1536), "gen": TargetSpec(1, 1024)}
IMAGES = 558_128
NOISES = (1.0, 0.3, 0.1)
MADE_BY = Fingerprint("benchmark", "none", {}, "squash", None)


def evict(folder: Path) -> None:
    """Evicts a folder's files from the page cache."""
    os.sync()
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as content:
                os.posix_fadvise(content.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def fill(folder: Path, codec: TargetCodec, parts: int, each: int) -> None:
    """Writes parts of ``each`` random targets to one teacher's folder."""
    StoredTeacher(MADE_BY, codec.spec, "float32", "none", {}).write(folder)
    generator = torch.Generator().manual_seed(0)
    packed = list(codec.pack(torch.randn(each, codec.spec.tokens, codec.spec.width, generator=generator)))
    for part in range(parts):
        digests = [number.to_bytes(16, "big") for number in range(part * each, (part + 1) * each)]
        write_part(folder, codec, digests, packed, f"{part:016x}")


def timed(read: Callable[[int], Any], order: list[int]) -> dict[str, float]:
    """Milliseconds per read: median and 95th percentile."""
    taken = []
    for number in order:
        start = time.perf_counter()
        read(number)
        taken.append(1000 * (time.perf_counter() - start))
    return {"median_ms": round(float(np.median(taken)), 3), "p95_ms": round(float(np.percentile(taken, 95)), 3)}


def access(root: Path, gigabytes: float) -> Iterator[dict[str, Any]]:
    """Times random reads of depth targets, cold and warm, by the store and by numpy's memmap of the same files."""
    for dtype in ("float16", "int8"):
        codec = TargetCodec(PUBLISHED["depth"], dtype)
        folder, each = root / dtype, min(512 << 20, int(gigabytes * 1e9)) // codec.target_bytes
        parts = max(1, round(gigabytes * 1e9 / (each * codec.target_bytes)))
        if not folder.is_dir():
            fill(folder, codec, parts, each)
        order = torch.randperm(parts * each, generator=torch.Generator().manual_seed(1))[:400].tolist()
        for name, opened in (("store", stored_targets), ("numpy.memmap", mapped_targets)):
            for state in ("cold", "warm"):
                if state == "cold":
                    evict(folder)  # no process maps the files now; mapped pages would stay in the cache
                found = timed(opened(folder, each, codec), order)
                line = {"read": name, "dtype": dtype, "bytes": codec.target_bytes, "targets": parts * each}
                yield {**line, "state": state, **found}
    many = root / "many"
    if not many.is_dir():
        fill(many, TargetCodec(TargetSpec(1, 4), "float16"), 2000, 300)
    start = time.perf_counter()
    opened_store = TaskTargets(many, "float16")
    seconds = time.perf_counter() - start
    yield {"open": "2000 parts of 300 targets", "seconds": round(seconds, 2), "targets": len(opened_store)}


def stored_targets(folder: Path, each: int, codec: TargetCodec) -> Callable[[int], Any]:
    """Reads as training does: looks up by digest, and copies like the collator."""
    store = TaskTargets(folder, codec.dtype)

    def read(number: int) -> Tensor:
        found = store.read(number.to_bytes(16, "big"))
        assert found is not None
        return found.clone()

    return read


def mapped_targets(folder: Path, each: int, codec: TargetCodec) -> Callable[[int], Any]:
    """Reads only the values, from their offset in the file."""
    maps = []
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as content:
            size = int.from_bytes(content.read(8), "little")
            begin = 8 + size + json.loads(content.read(size))["targets"]["data_offsets"][0]
        shape = (each, codec.spec.tokens, codec.spec.width)
        kind = np.float16 if codec.dtype == "float16" else np.int8
        maps.append(np.memmap(file, kind, "r", begin, shape))
    return lambda number: maps[number // each][number % each].copy()


def cases(photos: Path, onnx: Path | None, count: int) -> Iterator[tuple[str, Tensor]]:
    """Names and targets ``[count, N, E]``."""
    images = [open_image(file) for file in sorted(photos.rglob("*.jpg"))[:count]]

    def over(teacher: Teacher) -> Tensor:
        return torch.cat([teacher(teacher.see([image])) for image in images])

    for task in ("depth", "seg", "gen"):
        yield (
            f"quickstart {task}",
            over(build_teacher(TOWER, BASES / f"teacher_{task}")),
        )
    if onnx is not None:
        options = {"layout": "NHWC", "mean": 0.5, "std": 0.5, "output_layout": "NCHW"}
        features = {"seg": ("concat_projection/Relu", 8), "gen": ("AvgPool2D/AvgPool", 1)}
        for task, (output, grid) in features.items():
            yield f"DeepLabV3 {task}", over(build_teacher("onnx", onnx, output=output, grid=grid, **options))
    large = torch.ones(1024)
    large[::100] = 20
    yield "large channels", torch.randn(8, 576, 1024, generator=torch.Generator().manual_seed(2)) * large


def terms(predicted: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both losses and the gradient of their weighted sum with respect to the prediction."""
    predicted = predicted.clone().requires_grad_()
    smooth = smooth_l1(predicted, target).mean()
    contrastive = info_nce(predicted, target, torch.arange(len(target)), torch.tensor(2.0)).mean()
    (gradient,) = torch.autograd.grad(smooth + 0.3 * contrastive, predicted)
    return smooth.detach(), contrastive.detach(), gradient


def stored(target: Tensor, dtype: str, scaled: str) -> Tensor:
    """The targets after storing and reading, optionally with the other kind of scales."""
    spec = TargetSpec(target.shape[1], target.shape[2])
    before = quantize.FEW_TOKENS
    quantize.FEW_TOKENS = {"token": sys.maxsize, "channel": 0, "as shipped": before}[scaled]
    codec = TargetCodec(spec, dtype)
    values, scales = codec.encode(target)
    rows = [codec.join(value, None if scales is None else scales[i]) for i, value in enumerate(values)]
    found = codec.decode(torch.stack(rows))
    quantize.FEW_TOKENS = before
    return found


def errors(photos: Path, onnx: Path | None, count: int) -> Iterator[dict[str, Any]]:
    """Relative errors of the targets, of each loss and of the gradient."""
    for name, target in cases(photos, onnx, count):
        generator = torch.Generator().manual_seed(3)
        noise = torch.randn(target.shape, generator=generator) * target.std((0, 1), keepdim=True)
        for dtype in DTYPES:
            for scaled in ("token", "channel") if dtype in LARGEST and target.shape[1] > 1 else ("as shipped",):
                kept = stored(target, dtype, scaled)
                line: dict[str, Any] = {
                    "targets": name,
                    "shape": list(target.shape[1:]),
                    "dtype": dtype,
                    "scale": scaled,
                }
                line["target"] = float((kept - target).norm() / target.norm())
                for share in NOISES:
                    live, own = terms(target + share * noise, target), terms(target + share * noise, kept)
                    line[f"smooth_l1@{share}"] = float((own[0] - live[0]).abs() / live[0])
                    line[f"contrastive@{share}"] = float((own[1] - live[1]).abs() / live[1])
                    line[f"gradient@{share}"] = float((own[2] - live[2]).norm() / live[2].norm())
                yield {k: float(f"{v:.2g}") if isinstance(v, float) else v for k, v in line.items()}


def sizes() -> Iterator[dict[str, Any]]:
    """Bytes of the published targets for LLaVA-558K's images, if all differ."""
    for dtype in DTYPES:
        own = {task: TargetCodec(spec, dtype).target_bytes for task, spec in PUBLISHED.items()}
        gigabytes = {task: round(IMAGES * count / 1e9, 1) for task, count in own.items()}
        yield {"dtype": dtype, **gigabytes, "total": round(IMAGES * sum(own.values()) / 1e9, 1)}


def main() -> None:
    """Measures, prints, and writes the results with command, machine, versions and date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="needs twice --gigabytes")
    parser.add_argument("--gigabytes", type=float, default=4)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--onnx", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for measurement in (
        sizes(),
        errors(options.photos, options.onnx, options.images),
        access(options.folder, options.gigabytes),
    ):
        for line in measurement:
            print(json.dumps(line), flush=True)
            results.append(line)
    if options.out:
        packages = ("torch", "safetensors", "numpy", "pillow", "transformers")
        record = {
            "command": " ".join(["python", "benchmarks/targets.py", *sys.argv[1:]]),
            "date": date.today().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
            "load": os.getloadavg(),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
            "results": results,
        }
        options.out.parent.mkdir(exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
