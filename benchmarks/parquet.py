#!/usr/bin/env python
"""The time to read an image from Parquet files, compared with separate image files.

python benchmarks/parquet.py ROWS.json --images FOLDER [--repeat 10]
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np


def microseconds(read: Callable[[int], object], indices: list[int]) -> str:
    """Median and 99th percentile of single reads."""
    taken = []
    for index in indices:
        start = time.perf_counter()
        read(index)
        taken.append((time.perf_counter() - start) * 1e6)
    return f"{np.median(taken):.0f} us (99 %: {np.quantile(taken, 0.99):.0f} us)"


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("rows", type=Path, help="a file of LLaVA's JSON")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--repeat", type=int, default=10, help="number of copies of the rows")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["HF_DATASETS_CACHE"] = f"{scratch}/datasets"
        compare(options.rows, options.images, options.repeat, Path(scratch))


def compare(rows: Path, images: Path, repeat: int, scratch: Path) -> None:
    from visper.config import Source
    from visper.data.checks.digests import contents_of
    from visper.data.rows.parquet import write_parquet
    from visper.data.rows.records import DropList
    from visper.data.rows.sources import open_records

    many = scratch / "rows.json"
    many.write_text(json.dumps(json.loads(rows.read_text(encoding="utf-8")) * repeat))
    files = open_records([(many, images)], DropList())
    start = time.perf_counter()
    write_parquet(files, scratch / "out", DropList())
    size = sum(file.stat().st_size for file in (scratch / "out").iterdir()) / 1e6
    print(f"{len(files):,} rows, {size:.0f} MB: written in {time.perf_counter() - start:.1f} s")
    for which in ("first", "again"):
        start = time.perf_counter()
        parquet = open_records([Source.model_validate({"parquet": f"{scratch}/out/*.parquet"})], DropList())
        print(f"opened ({which}): {time.perf_counter() - start:.2f} s")
    indices = np.random.default_rng(0).integers(0, len(files), 4000).tolist()
    print("an image at random, Parquet:", microseconds(lambda i: contents_of(parquet, i), indices))
    print("an image at random, files:  ", microseconds(lambda i: contents_of(files, i), indices))


if __name__ == "__main__":
    main()
