"""``adapter/``: with it, the model that the stage started from is the finished one; otherwise there is none."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from tests import tiny
from tests.training.test_lora import LORA, rows, settings, start  # noqa: F401
from tests.vlms import FAMILIES, save_vlm
from visper.common.manifest import MANIFEST, require_undamaged
from visper.config import Run
from visper.training import run_stage

peft = pytest.importorskip("peft")

AT_IMAGE_TOKENS = {
    "depth": {
        "target": {"kind": "tests.tiny:PooledColors", "model": "colors"},
        "at": "image_tokens",
        "head": {"kind": "linear"},
        "layers": [2],
    }
}


def tuned(rows, out, capfd, optimization=None, **changes):  # noqa: F811
    """The output of a fine-tuning with low-rank updates, and what its log says of the adapter."""
    given = settings(rows, out, **{"lora": LORA, **changes}).model_dump()
    given["optimization"] |= optimization or {}
    given["data"]["max_tokens"] = 2048  # as many as the smallest of the families takes
    run_stage(Run.model_validate(given))
    printed = " ".join(capfd.readouterr().out.split())
    return Path(out), printed.partition(" adapter ")[2].partition(" saved ")[0]


def assert_adapter_gives_the_model(start_model, out):
    """Every weight: start plus adapter, merged, is ``model/``. Both are merged by the same code; none seen apart."""
    before = AutoModelForImageTextToText.from_pretrained(start_model)
    old = {name: value.clone() for name, value in before.state_dict().items()}
    found = peft.PeftModel.from_pretrained(before, out / "adapter").merge_and_unload().state_dict()
    expected = AutoModelForImageTextToText.from_pretrained(out / "model").state_dict()
    assert found.keys() == expected.keys()
    assert any(not torch.equal(value, old[name]) for name, value in expected.items())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6, msg=name)
    require_undamaged(out / "adapter")
    assert (out / "adapter" / MANIFEST).is_file()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimization": {"freeze": ["projector"]}},
        {"distillation": {"tasks": AT_IMAGE_TOKENS}},
    ],
    ids=["projector", "updates alone", "heads"],
)
def test_start_and_adapter_are_the_finished_model(changes, rows, start, tmp_path, capfd):  # noqa: F811
    out, said = tuned(rows, tmp_path / "out", capfd, start_from=str(start), **changes)
    assert not said
    assert_adapter_gives_the_model(start / "model", out)
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(start / "model")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"optimization": {"train": ["vision"]}}, r"all that the run has trained: vision\.\S+, .* and \d+ more"),
        ({"distillation": tiny.distillation()}, r"all that the run has trained: task_tokens\.queries\.depth, "),
    ],
    ids=["encoder", "task tokens"],
)
def test_there_is_no_adapter_if_more_was_trained_than_it_holds(changes, why, rows, start, tmp_path, capfd):  # noqa: F811
    out, said = tuned(rows, tmp_path / "out", capfd, start_from=str(start), **changes)
    assert not (out / "adapter").exists() and (out / "model" / "run.yaml").is_file()
    assert re.match(rf"not written, because it cannot hold {why}", said), said


def test_there_is_no_adapter_to_a_model_that_is_nowhere(rows, tiny_llm, tiny_encoder, tmp_path, capfd):  # noqa: F811
    out, said = tuned(rows, tmp_path / "out", capfd, student={"llm": str(tiny_llm), "encoder": str(tiny_encoder)})
    assert not (out / "adapter").exists()
    assert said.startswith("not written, because the run started from an LLM and an encoder")


def test_there_is_no_adapter_to_a_vocabulary_without_the_task_tokens(rows, tmp_path, capfd):  # noqa: F811
    folder = save_vlm(tmp_path / "vlm", "internvl")
    out, said = tuned(rows, tmp_path / "out", capfd, student={"vlm": str(folder), "task_tokens": {"order": ["depth"]}})
    assert not (out / "adapter").exists()
    assert said.startswith(f"not written, because the run has added task tokens to the vocabulary of '{folder}'")


@pytest.mark.parametrize(
    "family", [family if family == "qwen3_vl" else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]
)
def test_every_familys_adapter_gives_its_finished_model_or_is_left_out(family, rows, tmp_path, capfd):  # noqa: F811
    folder = save_vlm(tmp_path / family, family)
    out, said = tuned(rows, tmp_path / "out", capfd, student={"vlm": str(folder)})
    if family == "llava_onevision":  # peft saves modules, and this is a parameter of the whole model
        assert "all that the run has trained: projector.image_newline; " in said
        assert not (out / "adapter").exists()
    else:
        assert_adapter_gives_the_model(folder, out)
