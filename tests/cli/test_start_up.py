"""What a command imports before it does its work: none pays for libraries that it does not use."""

import json
import subprocess
import sys

import pytest

from tests import tiny

RUN = """
import sys
from visper.cli import app
try:
    app(sys.argv[1:])
except SystemExit as end:
    assert not end.code, end.code
print("imported:", *sys.modules)
"""


def imported(*command):
    """The modules that ``visper COMMAND`` has imported when it ends."""
    ended = subprocess.run([sys.executable, "-c", RUN, *command], check=True, capture_output=True, text=True)
    return set(ended.stdout.rpartition("imported: ")[2].split())


@pytest.mark.parametrize("command", [("--help",), ("--version",), ("recipes",), ("train", "--help")])
def test_help_and_lists_import_no_engine(command):
    found = imported(*command)
    assert "typer" in found
    assert not found & {"torch", "transformers", "datasets", "numpy"}


def test_help_reads_no_schema():
    assert "pydantic" not in imported("--help")


def test_rows_and_images_are_checked_without_torch(tmp_path):
    rows = tiny.write_rows(tmp_path)
    found = imported("data", "check", str(rows / "rows.json"), "--images", str(rows / "images"))
    assert "visper.data.checks.report" in found
    assert not found & {"torch", "transformers", "torchvision", "datasets"}


@pytest.mark.slow
def test_a_plan_imports_no_trainer():
    code = "import sys, visper.planning.plan; print('imported:', *sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert not {"datasets", "visper.training.trainer"} & set(ended.stdout.split())


@pytest.mark.slow
def test_training_runs_where_datasets_is_not_installed(tmp_path, tiny_llm, tiny_encoder):
    rows = tiny.write_rows(tmp_path / "rows", images=2, text_rows=0)
    run = {
        "name": "pt",
        "stage": "pt",
        "output": str(tmp_path / "pt"),
        "student": {"llm": str(tiny_llm), "encoder": str(tiny_encoder)},
        "data": {"sources": [{"json": str(rows / "rows.json"), "images": str(rows / "images")}], "workers": 0},
        "optimization": {"lr": 1e-3, "global_batch": 2, "micro_batch": 2, "max_steps": 1, "precision": "float32"},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(run), encoding="utf-8")
    hidden = "import sys; sys.modules['datasets'] = None\n" + RUN
    subprocess.run([sys.executable, "-c", hidden, "train", str(tmp_path / "run.yaml")], check=True, capture_output=True)
    assert (tmp_path / "pt" / "model" / "config.json").is_file()
