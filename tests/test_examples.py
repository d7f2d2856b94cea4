"""The examples parse, and their commands exist."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from visper.config import load_run
from visper.data.rows.records import DropList
from visper.data.rows.sources import open_records
from visper.evaluation import read_questions

EXAMPLES = Path(__file__).parents[1] / "examples"
COMMANDS = {
    "slurm.sbatch": lambda text: text.replace('"$1"', "llama3-8b-vit-l/ift"),
    "skypilot.yaml": lambda text: yaml.safe_load(text)["run"],
    "kubernetes.yaml": lambda text: list(yaml.safe_load_all(text))[1]["spec"]["template"]["spec"]["containers"][0][
        "args"
    ][0],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_train_runs_that_exist(name):
    script = COMMANDS[name]((EXAMPLES / name).read_text())
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    (command,) = re.findall(r"-m visper (.*)", script.replace("\\\n", " ").replace("\n  ", " "))
    verb, recipe, *changes = shlex.split(command)
    assert verb == "train" and changes[-1] == "--resume"
    assert load_run(recipe, changes[:-1]).launch.engine.value == "fsdp"


def test_the_pods_of_the_kubernetes_job_run_at_the_same_time():
    text = (EXAMPLES / "kubernetes.yaml").read_text()
    job = list(yaml.safe_load_all(text))[1]["spec"]
    nodes = int(re.search(r"--nnodes (\d+)", COMMANDS["kubernetes.yaml"](text))[1])
    assert job["completions"] == job["parallelism"] == nodes


def test_every_example_is_looked_at():
    assert {file.name for file in EXAMPLES.iterdir()} == COMMANDS.keys() | {"easy_vqa", "photographs"}


@pytest.fixture
def easy_vqa(tmp_path):
    """Two images and their questions in the package's format."""
    for split in ("train", "test"):
        folder = tmp_path / "data" / split
        (folder / "images").mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (64, 64), "white").save(folder / "images" / f"{number}.png")
        asked = [["what shape is in the image?", "circle", 0], ["is there a red shape?", "yes", 1]]
        asked += [["what color is the shape?", "red", 1]]
        (folder / "questions.json").write_text(json.dumps(asked))
    return tmp_path


def test_easy_vqa_is_written_as_rows_and_questions(easy_vqa):
    script = [sys.executable, str(EXAMPLES / "easy_vqa" / "prepare.py"), str(easy_vqa / "data")]
    subprocess.run([*script, "--out", str(easy_vqa / "out")], check=True, capture_output=True)
    files = {name: easy_vqa / "out" / f"{name}.json" for name in ("shapes", "train", "questions")}
    records = {name: open_records([(files[name], easy_vqa / "data")], DropList()) for name in ("shapes", "train")}
    assert [len(rows) for rows in records.values()] == [1, 3]
    first = records["train"][0]
    assert [turn.text for turn in first.turns] == ["what shape is in the image ?", "circle"]
    assert Path(first.images[0].path) == easy_vqa / "data" / "train" / "images" / "0.png"
    questions = read_questions(files["questions"])
    assert [question.kind for question in questions] == ["shape", "yes/no", "color"]
    (easy_vqa / "data" / "test" / "images" / "1.png").unlink()
    missing = subprocess.run(script, capture_output=True, text=True, check=False)
    assert missing.returncode == 1 and "1 images of" in missing.stderr


def test_easy_vqa_trains_by_recipes_that_load():
    folder = EXAMPLES / "easy_vqa"
    first, second = (load_run(folder / f"{name}.yaml") for name in ("shapes", "questions"))
    assert second.start_from == first.output
    shown = (folder / "README.md").read_text()
    assert all(f"visper train examples/easy_vqa/{name}.yaml" in shown for name in ("shapes", "questions"))
