"""What a command imports before it does its work: none pays for libraries that it does not use."""

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


def test_a_plan_imports_no_trainer():
    code = "import sys, visper.planning.plan; print('imported:', *sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert not {"datasets", "visper.training.trainer"} & set(ended.stdout.split())
