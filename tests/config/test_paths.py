"""Paths are expanded once, when they are read; an unset variable is an error, never a folder named '$DATA'."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from visper.cli import app
from visper.common.errors import ConfigError
from visper.config import load_run
from visper.config.paths import expand_path


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATA", "/big/disk")
    monkeypatch.delenv("NOWHERE", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("~/runs", "{home}/runs"),
        ("$DATA/x", "/big/disk/x"),
        ("${DATA}x", "/big/diskx"),
        ("a/~b", "a/~b"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "meta-llama/Meta-Llama-3-8B-Instruct"),
        ("s3://bucket/shards", "s3://bucket/shards"),
    ],
)
def test_home_and_variables_are_expanded(home, written, meant):
    assert expand_path(written) == meant.format(home=home)


def test_every_path_of_a_run_is_expanded(home):
    run = load_run(
        "llama3-8b-vit-l/pt",
        [
            "output=~/out",
            "data.root=$DATA/sets",
            "data.drop_list=['~/drop.jsonl']",
            "data.sources=[{json: $DATA/rows.json, images: ~/images}]",
            "student.llm=~/llm",
            "student.encoder=$DATA/encoder",
            "distillation.targets=~/targets",
            "distillation.tasks.depth.target.model=~/depth",
        ],
    )
    assert run.output == f"{home}/out" and run.data.root == "/big/disk/sets"
    assert run.data.drop_list == (f"{home}/drop.jsonl",)
    assert (run.data.sources[0].json_file, run.data.sources[0].images) == ("/big/disk/rows.json", f"{home}/images")
    assert run.student is not None and run.distillation is not None
    assert (run.student.llm, run.student.encoder) == (f"{home}/llm", "/big/disk/encoder")
    assert run.distillation.targets == f"{home}/targets"
    assert run.distillation.tasks["depth"].target.model == f"{home}/depth"


def test_an_unset_variable_is_named():
    with pytest.raises(ConfigError, match=r"'output'.*names the variable NOWHERE, which is not set"):
        load_run("llama3-8b-vit-l/pt", ["output=$NOWHERE/out"])


def test_the_command_line_expands_too(home):
    (home / "photo.txt").write_text("no image")
    shown = CliRunner().invoke(app, ["chat", "any", "--image", "~/photo.txt", "--prompt", "what?"])
    assert str(Path(home) / "photo.txt") in str(shown.exception)
