"""Small files in the benchmarks' published schemas."""

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def image_bytes(number: int) -> bytes:
    content = io.BytesIO()
    Image.effect_mandelbrot((20, 16), (-2, -1, 1, 1), 10 + 9 * number).convert("RGB").save(content, "PNG")
    return content.getvalue()


def write_cv_bench(root: Path) -> Path:
    """Two Count rows of ADE20K, one Relation of COCO; one Depth, one Distance of Omni3D."""
    folder = root / "eval" / "cv-bench"
    folder.mkdir(parents=True)
    rows = [
        ("test_2d", "2D", "Count", ["2", "1", "3"], "(B)", "ADE20K"),
        ("test_2d", "2D", "Count", ["4", "0"], "(A)", "ADE20K"),
        ("test_2d", "2D", "Relation", ["left", "right"], "(A)", "COCO"),
        ("test_3d", "3D", "Depth", ["car", "tree"], "(B)", "Omni3D"),
        ("test_3d", "3D", "Distance", ["car", "tree"], "(A)", "Omni3D"),
    ]
    for file in ("test_2d", "test_3d"):
        part = [
            {
                "idx": number,
                "type": kind,
                "task": task,
                "image": {"bytes": image_bytes(number), "path": f"{number}.png"},
                "question": f"question {number}?",
                "choices": choices,
                "answer": answer,
                "prompt": f"question {number}? Select from the following choices.",
                "filename": f"img/{number}.png",
                "source": source,
                "target_class": None if kind == "2D" else ["car"],
                "bbox": None if kind == "2D" else [[0.0, 1.0]],
            }
            for number, (own, kind, task, choices, answer, source) in enumerate(rows)
            if own == file
        ]
        pq.write_table(pa.Table.from_pylist(part), folder / f"{file}.parquet")  # bbox has another type in each file
    return folder


def write_mmstar(root: Path, answers: str = "ABCD") -> Path:
    folder = root / "eval" / "mmstar"
    folder.mkdir(parents=True)
    rows = [
        {
            "index": number,
            "question": f"Which {number}?\nOptions: A: red, B: blue, C: green, D: gray",
            "image": image_bytes(number),  # bytes, not the hub's struct
            "answer": answer,
            "category": "math",
            "l2_category": "geometry",
            "meta_info": {"source": "x", "split": "val", "image_path": "y"},
        }
        for number, answer in enumerate(answers)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "mmstar.parquet")
    return folder


REQUEST = "\nPlease answer directly with only the letter of the correct option and nothing else."
REALWORLD = [
    ("Which way?\n\nA. Left\nB. Right" + REQUEST, "B"),
    ("How many cars?\nPlease answer directly with a single word or number.", "2"),
]


def write_realworldqa(root: Path) -> Path:
    """In two files, as on the hub."""
    folder = root / "eval" / "realworldqa"
    folder.mkdir(parents=True)
    for number, (question, answer) in enumerate(REALWORLD):
        image = {"bytes": image_bytes(number), "path": None}
        table = pa.Table.from_pylist([{"image": image, "question": question, "answer": answer}])
        pq.write_table(table, folder / f"test-0000{number}-of-00002.parquet")
    return folder


def write_ok_vqa(root: Path) -> Path:
    folder, images = root / "eval" / "ok-vqa", root / "coco" / "val2014"
    folder.mkdir(parents=True)
    images.mkdir(parents=True)
    questions, annotations = [], []
    for number, answers in enumerate((["race"] * 6 + ["motocross"] * 2 + ["ride"] * 2, ["a dog"] * 10)):
        image, question = 42 + number, 1000 + number
        (images / f"COCO_val2014_{image:012d}.jpg").write_bytes(image_bytes(number))
        questions.append({"image_id": image, "question": f"What is {number}?", "question_id": question})
        given = [{"answer_id": i + 1, "raw_answer": f"{a}s", "answer": a} for i, a in enumerate(answers)]
        annotations.append({"image_id": image, "question_id": question, "question_type": "one", "answers": given})
    texts = {
        "OpenEnded_mscoco_val2014_questions.json": {"info": {}, "questions": questions},
        "mscoco_val2014_annotations.json": {"info": {}, "annotations": annotations[::-1]},
    }
    for name, content in texts.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def write_all(root: Path) -> Path:
    for write in (write_cv_bench, write_mmstar, write_realworldqa, write_ok_vqa):
        write(root)
    return root
