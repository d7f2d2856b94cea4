"""The teacher of one's own in docs/teachers.md trains, and is drawn."""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

from tests import tiny
from visper.config import load_run
from visper.config.kinds import TEACHERS
from visper.data.images import open_image
from visper.distillation.teachers import build_teacher
from visper.evaluation.predictions import load_pre_trained
from visper.evaluation.visualize import look
from visper.training import run_stage

PAGE = (Path(__file__).parents[1] / "docs" / "teachers.md").read_text(encoding="utf-8")


@pytest.fixture
def mine(monkeypatch):
    """A module with the page's class."""
    module = ModuleType("mine")
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(code, module.__dict__)
    monkeypatch.setitem(sys.modules, "mine", module)


def test_it_trains_by_the_pages_entry_and_is_drawn(mine, tmp_path, tiny_llm, tiny_encoder):
    rows = tiny.write_rows(tmp_path / "rows", images=4, text_rows=0)
    page = yaml.safe_load(re.findall(r"```yaml\n(student.*?)```", PAGE, re.DOTALL)[0])
    page["distillation"]["tasks"]["edges"]["layers"] = [2]
    run = {
        "name": "own",
        "stage": "pt",
        "output": str(tmp_path / "pt"),
        "student": {"llm": str(tiny_llm), "encoder": str(tiny_encoder), **page["student"]},
        "data": {"sources": [{"json": str(rows / "rows.json"), "images": str(rows / "images")}], "workers": 0},
        "distillation": page["distillation"],
        "optimization": {"global_batch": 2, "micro_batch": 2, "lr": 1e-2, "max_steps": 1, "precision": "float32"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    run_stage(load_run(tmp_path / "run.yaml"))
    found = load_pre_trained(tmp_path / "pt")
    assert found.teachers["edges"].spec.tokens == 64
    assert look(found, open_image(rows / "images" / "0.png")).width > 3 * 384


def test_its_target_is_flat_where_the_picture_is(mine):
    teacher = build_teacher("mine:Edges", "none", size=16)
    assert torch.equal(teacher(torch.full((2, 3, 16, 16), 0.3)), torch.zeros(2, 64, 2))


def test_every_kind_is_on_the_page():
    assert all(f"| `{kind}` |" in PAGE for kind in TEACHERS)
