"""The code of docs/targets.md, as it stands there: targets that another program has computed."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from tests import tiny
from visper.common.errors import DataError
from visper.data.checks.digests import image_id
from visper.training import StageTrainer, run_stage

PAGE = Path(__file__).parents[2] / "docs" / "targets.md"


def test_joint_targets_of_images_are_those_that_training_reads(tmp_path, monkeypatch):
    section = PAGE.read_text(encoding="utf-8").split("## Targets computed elsewhere\n")[1].split("\n## ")[0]
    code, recipe = (re.search(rf"```{language}\n(.*?)```", section, re.DOTALL)[1] for language in ("python", "yaml"))
    (tmp_path / "my_targets.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    import my_targets

    llm, encoder = tiny.save_llm(tmp_path / "llm"), tiny.save_encoder(tmp_path / "encoder")
    run_file = tiny.write_recipe(tmp_path, "pt", llm, encoder, max_steps=1)
    settings = json.loads(run_file.read_text()) | yaml.safe_load(recipe)
    settings["distillation"]["targets"] = str(tmp_path / "store")
    settings["distillation"]["tasks"]["scene"]["layers"] = [4]
    settings["optimization"] |= {"global_batch": 16, "micro_batch": 8}
    run_file.write_text(json.dumps(settings))

    images = sorted((tmp_path / "rows" / "images").iterdir())
    targets = torch.randn(len(images), 15, 6)
    my_targets.store(run_file, "scene", dict(zip(images[1:], targets[1:], strict=True)), tmp_path / "store", "float32")
    run = my_targets.load_run(run_file)
    with pytest.raises(DataError, match="1 images of task 'scene' are not in"):
        run_stage(run)
    my_targets.store(run_file, "scene", dict(zip(images, targets, strict=True)), str(tmp_path / "store"), "float32")

    expected = {image_id(image.read_bytes()): target for image, target in zip(images, targets, strict=True)}
    read = {}
    compute_loss = StageTrainer.compute_loss

    def recording(trainer, model, inputs, **more):
        read.update(zip(inputs["image_ids"].tolist(), inputs["targets"]["scene"].own, strict=True))
        return compute_loss(trainer, model, inputs, **more)

    monkeypatch.setattr(StageTrainer, "compute_loss", recording)
    run_stage(run)
    assert read.keys() == expected.keys() and all(torch.equal(read[one], expected[one]) for one in read)
