"""Prepares the comparison on photographs: rows, the edge teacher, and targets shuffled between photographs.

python examples/photographs/prepare.py rows photos --out comparison
visper targets build ...   (README.md)
python examples/photographs/prepare.py shuffle photos --out comparison
"""

import argparse
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from visper.data.checks.digests import digest
from visper.target_store.store import TEACHER, StoredTeacher, TaskTargets, claim_store, read_dtype, write_part

TRAINED, HELD_OUT = 160, 32
"""Numbers of captions, one per photograph. The rest of the file is not used."""
EVERY = 4
"""Every fourth photograph with questions, sorted by name, is held out."""


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a JSON file."""
    rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return rows


def split(photos: Path) -> dict[str, list[dict[str, Any]]]:
    """File name -> rows in LLaVA's format: captions and questions, for training and held out, split by photograph."""
    captions, asked = read_rows(photos / "pretrain.json"), read_rows(photos / "questions.json")
    held_out = set(sorted({question["image"] for question in asked})[::EVERY])
    rows = [(q["image"] in held_out, question_row(number, **q)) for number, q in enumerate(asked)]
    return {
        "captions": captions[:TRAINED],
        "captions-held-out": captions[-HELD_OUT:],
        "questions": [row for held, row in rows if not held],
        "questions-held-out": [row for held, row in rows if held],
    }


def question_row(number: int, image: str, question: str, answer: str) -> dict[str, Any]:
    """A conversation with one question."""
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": f"question-{number}", "image": image, "conversations": turns}


def edge_network() -> onnx.ModelProto:
    """RGB in 0..1 ``[B, 3, H, W]`` -> strength of edges in four directions ``[B, 4, H, W]``: |Sobel| of the brightness.

    Scaled so that the values of a photograph have a spread of about 1, like those of the other teacher.
    """
    across = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]], np.float32)
    rising = np.array([[-2, -1, 0], [-1, 0, 1], [0, 1, 2]], np.float32)
    kernels = np.stack([across, across.T, rising, rising[:, ::-1]])
    brightness = np.array([0.299, 0.587, 0.114], np.float32)
    weight = 4 * kernels[:, None] * brightness[None, :, None, None]
    nodes = [
        helper.make_node("Conv", ["rgb", "weight"], ["signed"], pads=[1, 1, 1, 1]),
        helper.make_node("Abs", ["signed"], ["edges"]),
    ]
    given = helper.make_tensor_value_info("rgb", TensorProto.FLOAT, ["batch", 3, "height", "width"])
    found = helper.make_tensor_value_info("edges", TensorProto.FLOAT, ["batch", 4, "height", "width"])
    graph = helper.make_graph(nodes, "edges", [given], [found], [numpy_helper.from_array(weight, "weight")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def shuffle_targets(store: Path, out: Path, shuffled: Sequence[bytes], kept: Sequence[bytes], seed: int = 0) -> None:
    """Writes a copy of a target store in which no image of ``shuffled`` has its own targets.

    Args:
        store: a store written by `visper targets build`.
        out: a new folder.
        shuffled: digests of images that exchange targets; the targets of all tasks come from the same other image.
        kept: digests of images that keep their own targets.
        seed: seed of the exchange.

    Raises:
        SystemExit: the store lacks an image, or there are fewer than two to shuffle.
    """
    order = list(dict.fromkeys(shuffled))
    if len(order) < 2:
        raise SystemExit(f"{len(order)} images cannot exchange targets: give at least two")
    random.Random(seed).shuffle(order)
    others = dict(zip(order, order[1:] + order[:1], strict=True)) | {own: own for own in kept if own not in set(order)}
    dtype = read_dtype(store)
    if dtype is None:
        raise SystemExit(f"no target store at '{store}': build it with `visper targets build`")
    claim_store(out, dtype)
    for folder in sorted(file.parent for file in store.glob(f"*/{TEACHER}")):
        targets = TaskTargets(folder, dtype)
        missing = len(targets.missing(list(others)))
        if missing:
            raise SystemExit(f"'{folder}' lacks {missing} of the images: build the targets first")
        StoredTeacher.read(folder).write(out / folder.name)
        given = [targets.read(other) for other in others.values()]
        write_part(out / folder.name, targets.codec, list(others), given, "shuffled")


def digests(photos: Path, file: Path) -> list[bytes]:
    """Digests of the images of a file's rows."""
    return [digest((photos / row["image"]).read_bytes()) for row in read_rows(file)]


def main() -> None:
    """Runs one of the two steps and writes its files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["rows", "shuffle"])
    parser.add_argument("photos", type=Path, help="folder with pretrain.json, questions.json and their photographs")
    parser.add_argument("--out", type=Path, default=Path("comparison"))
    options = parser.parse_args()
    if options.step == "shuffle":
        shuffled, kept = (digests(options.photos, options.out / f"captions{end}.json") for end in ("", "-held-out"))
        partial = options.out / "targets-shuffled.partial"
        shutil.rmtree(partial, ignore_errors=True)
        shuffle_targets(options.out / "targets", partial, shuffled, kept)
        partial.rename(options.out / "targets-shuffled")
        return
    options.out.mkdir(parents=True, exist_ok=True)
    for name, rows in split(options.photos).items():
        (options.out / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
        print(f"{options.out / name}.json: {len(rows)} rows")
    onnx.save(edge_network(), options.out / "edges.onnx")


if __name__ == "__main__":
    main()
