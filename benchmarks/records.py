"""The cost of a conversation file: parsed by ``json.load``, read once into a table, opened from the cached table.

The file is generated: LLaVA-665K's rows per source as published, with assumed turns and text lengths; escaped, it has
1.27 GB, the published file 1.03. Text rows lack the key ``image``; ids are strings and integers. Every measurement runs
in its own process. ``--photos`` also times the check of images, and ``--run`` the counting of tokens.

    python benchmarks/records.py --folder /tmp/records --photos photos/pretrain.json \\
        --out benchmarks/results/records.json
"""

import argparse
import json
import os
import platform
import random
import resource
import string
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

# rows (published), folder, question-answer pairs, characters of a question, of an answer (all three assumed means)
MIXTURE = (
    (157_712, "coco/train2017", 3, 60, 500),
    (82_783, "coco/train2017", 5, 45, 5),
    (8_998, "coco/train2017", 1, 90, 8),
    (66_160, "coco/train2017", 1, 190, 2),
    (48_447, "coco/train2017", 5, 90, 30),
    (72_140, "gqa/images", 12, 50, 5),
    (80_000, "ocr_vqa/images", 5, 40, 25),
    (21_953, "textvqa/train_images", 1, 300, 12),
    (86_417, "vg/VG_100K", 11, 85, 30),
    (40_688, None, 4, 250, 1200),
)


def generate(file: Path, rows: int) -> None:
    """Writes a shuffled list of about ``rows`` rows."""
    rng = random.Random(0)
    letters = "".join(rng.choices(string.ascii_lowercase + '     .,\n"é中', k=1 << 20))

    def text(mean: int) -> str:
        start = rng.randrange(len(letters) - 10 * mean)
        return letters[start : start + max(1, min(10 * mean, int(rng.expovariate(1 / mean))))]

    share = rows / sum(source[0] for source in MIXTURE)
    plan = [source for source in MIXTURE for _ in range(round(source[0] * share))]
    rng.shuffle(plan)
    with file.open("w", encoding="utf-8") as out:
        for i, (_, folder, pairs, question, answer) in enumerate(plan):
            turns = []
            for _ in range(rng.randint(1, 2 * pairs - 1)):
                turns += [{"from": "human", "value": text(question)}, {"from": "gpt", "value": text(answer)}]
            row: dict[str, Any] = {"id": i if i % 3 else f"{i:012d}"}
            if folder is None:
                row["model"] = ""
            else:
                row["image"] = f"{folder}/{rng.randrange(118_287):012d}.jpg"
                turns[0]["value"] = "<image>\n" + turns[0]["value"]
            out.write(("[" if i == 0 else ", ") + json.dumps(row | {"conversations": turns}))
        out.write("]")


def whole(file: Path) -> dict[str, Any]:
    """Parses the file as the published code does in every process."""
    with file.open(encoding="utf-8") as stream:
        return {"rows": len(json.load(stream))}


def streamed(file: Path) -> dict[str, Any]:
    """Reads only the rows, with the reader of `datasets`."""
    from visper.data.rows.json_rows import read_rows

    return {"rows": sum(1 for _ in read_rows(file))}


def build(file: Path) -> dict[str, Any]:
    """Reads the file once into the table."""
    from visper.data.rows.table import open_table

    table = open_table(file)
    return {"rows": len(table), "table_mb": table.path.stat().st_size >> 20}


def with_datasets(file: Path) -> dict[str, Any]:
    """Stores the same rows with `datasets` instead of the table, then opens them and reads at random."""
    import datasets

    from visper.data.rows.json_rows import read_rows
    from visper.data.rows.table import SCHEMA, cells

    begin = time.perf_counter()
    datasets.disable_progress_bars()
    kept = datasets.Dataset.from_generator(
        lambda: map(cells, read_rows(file)),
        features=datasets.Features.from_arrow_schema(SCHEMA),
        cache_dir=str(file.parent / "datasets"),
        fingerprint="mix",
    )
    build_s, before, start = time.perf_counter() - begin, anonymous(), time.perf_counter()
    rows = datasets.concatenate_datasets([datasets.Dataset.from_file(part["filename"]) for part in kept.cache_files])
    seconds = time.perf_counter() - start
    rng, times = random.Random(1), []
    for _ in range(20_000):
        index, begin = rng.randrange(len(rows)), time.perf_counter()
        assert "texts" in rows[index]
        times.append(time.perf_counter() - begin)
    return {
        "build_s": round(build_s, 1),
        "open_s": round(seconds, 4),
        "own_mb_after_reading": (anonymous() - before) >> 10,
        "row_us_median": round(1e6 * sorted(times)[len(times) // 2], 1),
    }


def opened(file: Path) -> dict[str, Any]:
    """Opens the cached table, then reads rows at random; imports are not counted."""
    from visper.data.rows.records import DropList
    from visper.data.rows.sources import open_records

    before, start = anonymous(), time.perf_counter()
    records = open_records([(file, "images")], DropList())
    seconds, grown = time.perf_counter() - start, anonymous() - before
    rng = random.Random(1)
    times, busy = [], []
    for _ in range(20_000):
        index, begin, used = rng.randrange(len(records)), time.perf_counter(), time.thread_time()
        assert records[index].turns
        busy.append(time.thread_time() - used)
        times.append(time.perf_counter() - begin)
    times.sort()
    return {
        "open_s": round(seconds, 4),
        "own_mb_after_open": grown >> 10,
        "own_mb_after_reading": (anonymous() - before) >> 10,
        "row_us_median": round(1e6 * times[len(times) // 2], 1),
        "row_us_99.9%": round(1e6 * times[int(len(times) * 0.999)], 1),
        "row_us_slowest": round(1e6 * times[-1], 1),
        "row_us_slowest_on_the_cpu": round(1e6 * max(busy), 1),  # without the waits for other processes
        "rows_over_1_ms": sum(seconds > 1e-3 for seconds in times),
        "rows_asked": len(times),
    }


def images(file: Path) -> dict[str, Any]:
    """Checks every image, on one core and on all, and decodes them as training does."""
    from visper.common.parallel import in_order, num_cores
    from visper.data.checks.image_files import look
    from visper.data.images import open_image

    rows = json.loads(file.read_text(encoding="utf-8"))
    paths = [str(file.parent / row["image"]) for row in rows if "image" in row]
    rates = {"images": len(paths)}
    for path in paths:
        Path(path).read_bytes()
    for name, function in (("look_per_s", look), ("decode_per_s", open_image)):
        start = time.perf_counter()
        for path in paths:
            function(path)
        rates[name] = round(len(paths) / (time.perf_counter() - start))
    start, often = time.perf_counter(), paths * 10
    assert all(verdict.reason is None for verdict in in_order(look, often, "", quiet=True, workers=num_cores()))
    return rates | {"cores": num_cores(), "look_all_cores_per_s": round(len(often) / (time.perf_counter() - start))}


def named(file: Path) -> dict[str, Any]:
    """Reads the distinct images that the rows name, as ``visper data prepare`` does."""
    from visper.data.rows.formats import image_names

    return {"distinct_images": len(set(image_names(file)))}


def tokens(file: Path, run: str) -> dict[str, Any]:
    """Counts tokens on one core, then looks the counts up."""
    from visper.config import load_run
    from visper.data.chat import ConversationEncoder
    from visper.data.rows.lengths import measure
    from visper.data.rows.records import DropList
    from visper.data.rows.sources import open_records
    from visper.model.start import starting_processor

    records = open_records([(file, "images")], DropList())
    encoder = ConversationEncoder(starting_processor(load_run(run)), 4096)
    times = []
    for _ in range(2):
        start = time.perf_counter()
        measure(records, encoder, quiet=True)
        times.append(time.perf_counter() - start)
    return {"rows": len(records), "rows_per_s": round(len(records) / times[0]), "looked_up_s": round(times[1], 2)}


def anonymous() -> int:
    """Private memory of this process in KiB, without shared memory that is mapped from files."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")))


STEPS: dict[str, Callable[..., dict[str, Any]]] = {
    step.__name__: step for step in (whole, streamed, named, build, with_datasets, opened, images, tokens)
}


def in_process(step: str, *arguments: str) -> dict[str, Any]:
    """Runs one measurement in its own process."""
    done = subprocess.run([sys.executable, __file__, "--step", step, *arguments], capture_output=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(step, json.dumps(result), flush=True)
    return result


def main() -> None:
    """Measures, prints, and writes the results with command, machine, versions and date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="folder of the file and its cache, 2 GB")
    parser.add_argument("--rows", type=int, default=665_298)
    parser.add_argument("--photos", help="a conversation file whose image paths start from its own folder")
    parser.add_argument("--run", help="a recipe whose tokenizer is on this machine")
    parser.add_argument(
        "--only", nargs="+", choices=STEPS, help="run only these measurements; the others stay in --out"
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        name, place, *more = options.step
        start = time.perf_counter()
        found = STEPS[name](Path(place), *more)
        seconds, used = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
        cost = {"seconds": round(seconds, 2), "cpu_seconds": round(used.ru_utime + used.ru_stime, 2)}
        print(json.dumps(cost | {"peak_mb": used.ru_maxrss >> 10, **found}))
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    file = options.folder / f"mix-{options.rows}.json"
    if not file.is_file():
        generate(file, options.rows)
    steps = options.only or ["whole", "streamed", "named", "build", "with_datasets", "opened"]
    more = {"images": [options.photos], "tokens": [str(file), options.run]}
    steps += [step for step, arguments in more.items() if arguments[-1] and step not in steps]
    results = {step: in_process(step, *more.get(step, [str(file)])) for step in steps}
    if options.out:
        packages = ("pyarrow", "datasets", "pillow", "tokenizers", "transformers", "torch")
        record = {
            "last_command": " ".join(["python", *sys.argv]),
            "date": date.today().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
            "load_at_the_end": [round(load, 1) for load in os.getloadavg()],
            "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
            "file_mb": file.stat().st_size >> 20,
        }
        if options.out.is_file():
            results = json.loads(options.out.read_text(encoding="utf-8"))["results"] | results
        record["results"] = results
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
