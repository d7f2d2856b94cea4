"""The losses of the tiny runs, step by step: a change that is not meant to change them leaves them as they stand here.

On one machine they repeat bit for bit. Elsewhere sums take another order: with the kernels of torch, MKL and oneDNN for
AVX2, and for none at all, the largest relative difference from those for AVX-512 was 4.4e-7.

Write them anew (after a change that is meant to change them): python -m tests.training.test_golden_losses
"""

import json
import tempfile
from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.logs import computed
from visper.config import Run
from visper.training import run_stage

GOLDEN = Path(__file__).with_name("golden_losses.json")
STAGES = ("pt", "vpt", "ift")
TOLERANCE = 1e-6


def losses(stage: str, folder: Path, llm: Path, encoder: Path) -> list[dict[str, float]]:
    """Six steps, an epoch and a half, of one stage that assembles its student."""
    rows = tiny.write_rows(folder / "rows")
    settings = {
        "name": stage,
        "stage": stage,
        "output": str(folder / stage),
        "student": {"llm": str(llm), "encoder": str(encoder)},
        "data": {"sources": [{"json": str(rows / "rows.json"), "images": str(rows / "images")}], "workers": 0},
        "optimization": {"global_batch": 4, "micro_batch": 2, "lr": 1e-3, "max_steps": 6, "precision": "float32"},
        "logging": {"every": 1},
    }
    if stage == "pt":
        settings["distillation"] = tiny.distillation()
    run_stage(Run.model_validate(settings))
    return computed(folder / stage)


@pytest.mark.parametrize("stage", STAGES)
def test_losses_are_as_they_were(stage, tmp_path, tiny_llm, tiny_encoder):
    expected = json.loads(GOLDEN.read_text())[stage]
    found = losses(stage, tmp_path, tiny_llm, tiny_encoder)
    assert len(found) == len(expected)
    for now, before in zip(found, expected, strict=True):
        assert now == pytest.approx(before, rel=TOLERANCE, abs=1e-9)


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        llm, encoder = tiny.save_llm(folder / "llm"), tiny.save_encoder(folder / "encoder")
        found = {stage: losses(stage, folder / f"run-{stage}", llm, encoder) for stage in STAGES}
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
