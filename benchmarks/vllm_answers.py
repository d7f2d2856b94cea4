"""Does vLLM see the prompt of training, and answer as transformers does? Run by hand, in two environments.

    python benchmarks/vllm_answers.py visper --model quick/ift/model --world quick/world --out ours.json
    python benchmarks/vllm_answers.py vllm --model quick/ift/model --world quick/world --out v.json --beside ours.json

The second command runs in vLLM's environment, which does not need visper.
"""

from __future__ import annotations

import argparse
import base64
import json
from pathlib import Path
from typing import Any

Said = list[dict[str, Any]]


def ask_visper(model: Path, rows: Said, images: Path, tokens: int) -> Said:
    """The answers of ``visper evaluate``, one question at a time."""
    from visper.data.images import open_image
    from visper.evaluation import answer, load_to_ask
    from visper.evaluation.ask import model_inputs

    student = load_to_ask(model)
    found = []
    for row in rows:
        shown = [open_image(images / row["image"])]
        length = model_inputs(student.processor, [row["question"]], [shown])["input_ids"].shape[1]
        found.append({"said": answer(student, [row["question"]], [shown], tokens)[0], "prompt_tokens": length})
    return found


def ask_vllm(model: Path, rows: Said, images: Path, tokens: int) -> Said:
    """Answers to the same questions, given to vLLM as chat messages that contain the image."""
    from vllm import LLM, SamplingParams

    def message(row: dict[str, Any]) -> list[dict[str, Any]]:
        data = base64.b64encode((images / row["image"]).read_bytes()).decode()
        image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
        return [{"role": "user", "content": [image, {"type": "text", "text": row["question"]}]}]

    engine = LLM(str(model), dtype="float32", max_model_len=512, limit_mm_per_prompt={"image": 1}, enforce_eager=True)
    outputs = engine.chat([message(row) for row in rows], SamplingParams(temperature=0, max_tokens=tokens))
    return [
        {"said": output.outputs[0].text.strip(), "prompt_tokens": len(output.prompt_token_ids)} for output in outputs
    ]


def main() -> None:
    """Writes the answers; with ``--beside``, prints how many are equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=["visper", "vllm"])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--world", type=Path, required=True, help="the quickstart's world")
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--beside", type=Path, help="answers to compare with")
    options = parser.parse_args()
    rows = json.loads((options.world / "questions.json").read_text(encoding="utf-8"))
    rows = rows[:: max(1, len(rows) // options.count)][: options.count]
    ask = {"visper": ask_visper, "vllm": ask_vllm}[options.engine]
    found = ask(options.model, rows, options.world / "images", options.tokens)
    options.out.write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(f"{sum(f['said'] == row['answer'] for f, row in zip(found, rows, strict=True))} of {len(rows)} right")
    if options.beside:
        others = json.loads(options.beside.read_text(encoding="utf-8"))
        for key in ("prompt_tokens", "said"):
            print(f"{key}: {sum(a[key] == b[key] for a, b in zip(found, others, strict=True))} of {len(rows)} equal")


if __name__ == "__main__":
    main()
