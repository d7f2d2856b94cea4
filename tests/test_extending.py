"""The code of docs/extending.md, as it stands there: a plain loop, TRL's SFTTrainer, a head and a loss of one's own."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from tests import tiny
from tests.distillation.vlms import build
from tests.vlms import save_vlm
from visper.config import Distillation
from visper.distillation import DistilledTask, TargetSpec, attach

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"


def code(title, language="python"):
    """The one block of a section."""
    (section,) = re.findall(
        rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    (block,) = re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)
    return block


def run(block):
    names = {}
    exec(compile(block, str(PAGE), "exec"), names)
    return names


@pytest.fixture
def train():
    block = code("Distillation in your own training loop")
    assert len(block.splitlines()) <= 42, "an example to read at a glance"
    return run(block)["train"]


@pytest.mark.parametrize("family", ["smolvlm", "qwen2_5_vl"])
def test_the_example_adds_distillation_to_a_plain_loop(train, family):
    model, batch = build(family)
    teachers = {"depth": tiny.PooledColors("a", grid=2, width=6), "gen": tiny.PooledColors("b", grid=1, width=8)}
    pictures = [Image.new("RGB", (9, 7), color) for color in ("red", "blue")]
    text = {key: batch[key][:, -3:] for key in ("input_ids", "attention_mask", "labels")}
    loader = [(batch, pictures)] * 6 + [(text, [])]
    distiller, history = train(model, loader, teachers, {"depth": (1, 3), "gen": (2,)}, lr=1e-2)
    terms = {"depth/1/smooth_l1", "depth/3/info_nce", "gen/2/smooth_l1", "ntp"}
    assert terms <= history[0].keys()
    for name in ("depth/1/smooth_l1", "gen/2/smooth_l1", "ntp"):
        assert 0 < history[5][name] < history[0][name], f"{name} does not fall"
    assert all(value == 0 for name, value in history[6].items() if name != "ntp"), "a batch of text adds nothing"
    assert any(parameter.requires_grad for parameter in distiller.parameters())


def test_ten_lines_add_distillation_to_trls_trainer(tmp_path):
    trl = pytest.importorskip("trl")
    datasets, transformers = importlib.import_module("datasets"), importlib.import_module("transformers")
    block = code("In TRL's SFTTrainer")
    assert sum(line.endswith("# +") for line in block.splitlines()) <= 10
    student = save_vlm(tmp_path / "student", "qwen3_vl")
    teachers = {"depth": tiny.PooledColors("a", grid=2, width=6)}
    messages = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "a color"}]
    colors = ("red", "blue", "green", "white")
    rows = [{"images": [Image.new("RGB", (16, 16), color)], "messages": messages} for color in colors]
    settings = {"max_steps": 6, "logging_steps": 1, "learning_rate": 1e-2, "report_to": "none", "use_cpu": True}
    trainer = run(block)["finetune"](
        transformers.AutoModelForImageTextToText.from_pretrained(student),
        trl.SFTConfig(str(tmp_path / "out"), save_strategy="no", per_device_train_batch_size=4, **settings),
        datasets.Dataset.from_list(rows),
        teachers,
        {"depth": (1, 3)},
        processing_class=transformers.AutoProcessor.from_pretrained(student),
    )
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    for term in ("depth/1/smooth_l1", "depth/3/smooth_l1"):
        assert 0 < history[-1][term] < history[0][term]


def test_a_head_and_a_loss_of_ones_own_train_by_recipe(tmp_path, monkeypatch):
    block = code("A head or a loss of your own")
    assert len(block.splitlines()) <= 60
    (tmp_path / "my_parts.py").write_text(block, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    recipe = yaml.safe_load(code("A head or a loss of your own", "yaml"))["distillation"]
    task = Distillation.model_validate(recipe).tasks["dino"]
    model, batch = build("llava")
    distiller = attach(model, {"dino": DistilledTask.of(task, TargetSpec(4, 6, (2, 2)))})
    with distiller.tap() as hidden:
        model(**batch)
        terms = distiller(hidden, batch["input_ids"], batch["attention_mask"], {"dino": torch.zeros(2, 4, 6)})
    distiller.total(terms).backward()
    head = distiller.objective.predictors["dino_2"]
    assert head.layers[1].bias is None and head.layers[1].weight.grad.any()
    assert terms["dino/2/l1"] > 0
    l1 = sys.modules["my_parts"].l1
    values, mask = torch.tensor([[[1.0, -3.0], [5.0, 5.0]]]), torch.tensor([[True, False]])
    assert l1(values, torch.zeros(1, 2, 2)).tolist() == [3.5] and l1(values, torch.zeros(1, 2, 2), mask).tolist() == [
        2.0
    ]
    monkeypatch.delitem(sys.modules, "my_parts")
