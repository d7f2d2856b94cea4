"""The code of docs/extending.md, as it stands there, trains a model in a plain loop."""

import re
from pathlib import Path

import pytest
from PIL import Image

from tests import tiny
from tests.distillation.vlms import build

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"


@pytest.fixture
def train():
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(block.splitlines()) <= 42, "an example to read at a glance"
    names = {}
    exec(compile(block, str(PAGE), "exec"), names)
    return names["train"]


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
