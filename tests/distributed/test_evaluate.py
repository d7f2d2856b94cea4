"""Two processes score what one scores, and a command that was killed goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests import tiny
from visper.config import Geometry, Student
from visper.model import build_student, save_student

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("LOCAL_WORLD_SIZE", "WORLD_SIZE", "RANK")} | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}",
    "COLUMNS": "160",
}
WAIT_S = 120


@pytest.fixture
def command(tmp_path, tiny_llm, tiny_encoder):
    """``visper evaluate`` of a tiny model on 80 questions."""
    torch.manual_seed(0)
    student = build_student(Student(llm=str(tiny_llm), encoder=str(tiny_encoder)), Geometry.SQUASH)
    with torch.no_grad():
        for weight in student.model.parameters():
            if weight.dim() == 2:
                weight.normal_(std=0.5)
    save_student(student, tmp_path / "model")
    rows = tiny.write_rows(tmp_path / "rows", images=8, text_rows=0)
    questions = [
        {"question": f"what is {i}?", "answer": "thing", "image": f"{i % 8}.png", "kind": f"k{i % 2}"}
        for i in range(80)
    ]
    (tmp_path / "q.json").write_text(json.dumps(questions))
    return [
        *(sys.executable, "-m", "visper", "evaluate", str(tmp_path / "model")),
        *("--questions", str(tmp_path / "q.json"), "--images", str(rows / "images"), "--max-new-tokens", "8"),
    ]


def start(command, *more):
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*command, *more], env=ENVIRONMENT, **options)


def run(command, *more):
    process = start(command, *more)
    text, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, text[-3000:]
    return text[text.index("┏") : text.index("raw answers")].strip()


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_score_as_one_and_a_killed_command_goes_on(command, tmp_path):
    one, two, cut = (tmp_path / f"{name}.jsonl" for name in ("one", "two", "cut"))
    scored = run(command, "--answers", str(one))
    assert len(rows_of(one)) == 160 and len({row["said"] for row in rows_of(one)}) > 8
    assert run(command, "--answers", str(two), "--processes", "2") == scored
    assert rows_of(two) == rows_of(one)
    assert not list(tmp_path.glob("*.part-*"))

    process = start(command, "--answers", str(cut), "--batch-size", "1")
    until = time.monotonic() + WAIT_S
    part = tmp_path / "cut.jsonl.part-0"
    while not (part.exists() and part.read_text().count("\n") > 6):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == 143 and "to go on, repeat the command" in " ".join(text.split())
    kept = len([line for line in part.read_text().split("\n") if line])
    assert 0 < kept < 160
    assert run(command, "--answers", str(cut), "--batch-size", "1") == scored
    assert rows_of(cut) == rows_of(one)
