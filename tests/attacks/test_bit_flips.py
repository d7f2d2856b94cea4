"""A flipped bit in any file that a run wrote: the same content is read, or an error names the file or folder."""

import random
import shutil

import pytest

from tests import tiny
from visper.common.console import Console
from visper.common.errors import DataError
from visper.common.manifest import MEANT_TO_BE_EDITED
from visper.config import load_run
from visper.model import load_student
from visper.training import run_stage
from visper.training.checkpoint import checkpoints, newest_undamaged


@pytest.fixture(scope="module")
def output(tmp_path_factory, tiny_llm, tiny_encoder):
    folder = tmp_path_factory.mktemp("flipped")
    recipe = tiny.write_recipe(folder, "ift", tiny_llm, tiny_encoder, max_steps=2)
    run_stage(load_run(recipe, ["logging.save_every=1"]))
    return folder / "ift"


def files_of(folder):
    return sorted(file for file in folder.rglob("*") if file.is_file() and file.stat().st_size)


def flip(file, chance):
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


def attack_checkpoint(output, folder, flips):
    """Every file of the newest checkpoint, ``flips`` times each: it is set aside, and the one before is taken."""
    chance = random.Random(flips)
    newest = checkpoints(output)[-1]
    for name in (file.relative_to(output) for file in files_of(newest)):
        for _ in range(flips):
            copy = folder / "copy"
            shutil.copytree(output, copy)
            flip(copy / name, chance)
            found = newest_undamaged(copy, Console(quiet=True))
            assert found == checkpoints(copy)[-1] and found.name == "checkpoint-1", name
            assert newest.name + ".damaged" in {path.name for path in found.parent.iterdir()}
            shutil.rmtree(copy)


def attack_model(output, folder, flips):
    """Every file of the finished model, ``flips`` times each; but for those that a person may edit, and the record."""
    chance = random.Random(flips)
    shutil.copytree(output / "model", folder / "model")
    for file in files_of(folder / "model"):
        content = file.read_bytes()
        for _ in range(0 if file.name in ("run.yaml", *MEANT_TO_BE_EDITED) else flips):
            flip(file, chance)
            with pytest.raises(DataError, match=f"damaged folder: '{folder}/model'"):
                load_student(folder / "model")
        file.write_bytes(content)
    load_student(folder / "model")


def test_a_flipped_bit_in_a_checkpoint_costs_that_checkpoint(output, tmp_path):
    attack_checkpoint(output, tmp_path, 2)


def test_a_flipped_bit_in_a_finished_model_is_named(output, tmp_path):
    attack_model(output, tmp_path, 2)


@pytest.mark.nightly
def test_many_flipped_bits_in_every_file(output, tmp_path):
    attack_checkpoint(output, tmp_path, 100)
    attack_model(output, tmp_path, 60)
