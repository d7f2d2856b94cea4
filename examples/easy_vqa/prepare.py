"""Converts easy-VQA (PyPI: easy-vqa) to rows for `visper train` and questions for `visper evaluate`.

python examples/easy_vqa/prepare.py PACKAGE/easy_vqa/data --out easy-vqa
"""

import argparse
import json
import re
from pathlib import Path

SPLITS = ("train", "test")
YES_NO = ("yes", "no")


def spaced(text: str) -> str:
    """Separates punctuation from words, because the quickstart's tokenizer splits only at spaces."""
    return re.sub(r"\s*([?.,])", r" \1", text)


def kind_of(question: str, answer: str) -> str:
    """The kind of a question: yes/no, color or shape."""
    if answer in YES_NO:
        return "yes/no"
    return "color" if "color" in question.split() else "shape"


def read_questions(data: Path, split: str) -> list[tuple[str, str, str]]:
    """Question, answer and image path of every question of a split, in the package's order.

    Raises:
        SystemExit: the folder does not have the package's data, or an image is missing.
    """
    file = data / split / "questions.json"
    if not file.is_file():
        raise SystemExit(f"{file} is missing: give the folder 'easy_vqa/data' of the unpacked package")
    asked = [(spaced(q), a, f"{split}/images/{image}.png") for q, a, image in json.loads(file.read_text("utf-8"))]
    absent = sorted({image for *_, image in asked if not (data / image).is_file()})
    if absent:
        raise SystemExit(
            f"{len(absent)} images of {file} are missing, the first is {data / absent[0]}: unpack it again"
        )
    return asked


def shape_rows(asked: list[tuple[str, str, str]]) -> list[dict[str, object]]:
    """The conversations that ask for a shape, for the first stage."""
    return training_rows([one for one in asked if kind_of(*one[:2]) == "shape"])


def training_rows(asked: list[tuple[str, str, str]]) -> list[dict[str, object]]:
    """One conversation per question. Those about one image are neighbors, so that `join_conversations` joins them."""
    return [
        {
            "id": str(number),
            "image": image,
            "conversations": [
                {"from": "human", "value": f"<image>\n{question}"},
                {"from": "gpt", "value": answer},
            ],
        }
        for number, (question, answer, image) in enumerate(asked)
    ]


def test_questions(asked: list[tuple[str, str, str]]) -> list[dict[str, str]]:
    """The rows of `visper evaluate --questions`, with each question's kind."""
    return [{"question": q, "answer": a, "image": image, "kind": kind_of(q, a)} for q, a, image in asked]


def main() -> None:
    """Writes shapes.json, train.json and questions.json. Image paths are relative to the package's data folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the package's folder easy_vqa/data")
    parser.add_argument("--out", type=Path, default=Path("easy-vqa"), help="folder of the three files")
    options = parser.parse_args()
    train, test = (read_questions(options.data, split) for split in SPLITS)
    options.out.mkdir(parents=True, exist_ok=True)
    files = {
        "shapes.json": shape_rows(train),
        "train.json": training_rows(train),
        "questions.json": test_questions(test),
    }
    for name, rows in files.items():
        (options.out / name).write_text(json.dumps(rows), encoding="utf-8")
        print(f"{options.out / name}: {len(rows)} rows")


if __name__ == "__main__":
    main()
