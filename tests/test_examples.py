"""The examples parse, and the commands in them are commands of ours."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from visper.config import load_run

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


def test_every_example_is_looked_at():
    assert {file.name for file in EXAMPLES.iterdir()} == COMMANDS.keys()
