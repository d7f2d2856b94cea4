"""Everything that ``common/compat.py`` uses exists in the installed versions; no other file uses private names."""

import ast
import importlib.util
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, Trainer

from visper.common import compat

SOURCES = Path(compat.__file__).parents[1]


@pytest.fixture
def llm():
    config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
    return LlamaForCausalLM(config)


def test_the_trainers_private_methods_exist():
    assert not [name for name in compat.TRAINER_METHODS if not callable(getattr(Trainer, name, None))]


def test_attention_is_read_back_as_it_was_set(llm):
    for name in ("eager", "sdpa"):
        llm.set_attn_implementation(name)
        assert compat.attention_of(llm) == name


def test_a_model_that_was_assembled_is_saved_under_published_names(tmp_path):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=8, patch_size=4))
    compat.save_under_published_names(model)
    model.save_pretrained(tmp_path)
    assert all(name.startswith("vision_model.") for name in load_file(tmp_path / "model.safetensors"))


def test_every_layer_is_recomputed_and_embeddings_require_no_gradient(llm):
    llm.requires_grad_(False)
    compat.recompute_layers(llm)
    assert all(layer.gradient_checkpointing for layer in llm.model.layers)
    assert not llm.get_input_embeddings()(torch.tensor([1])).requires_grad


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="the extra 'deepspeed' is not installed")
def test_deepspeed_marks_the_parameters_that_it_partitions():
    from deepspeed.runtime.zero import partition_parameters

    assert "param.ds_id" in Path(partition_parameters.__file__).read_text(encoding="utf-8")
    assert not compat.is_partitioned(nn.Parameter(torch.zeros(1)))


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="the extra 'lora' is not installed")
def test_peft_leaves_its_configuration_on_the_model(llm):
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), llm)
    assert "peft_config" in llm.__dict__
    compat.forget_adapters(llm)
    assert "peft_config" not in llm.__dict__


DOCUMENTED = ("_exit",)
"""Public in spite of its name: ``os._exit``."""


def private(name):
    return name.startswith("_") and not name.startswith("__") and name not in DOCUMENTED


def names_defined_here():
    """Private names that this package gives its own things, and the Trainer's methods that it overrides."""
    found = set()
    for file in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
                found.add(node.attr)
    return found


def test_no_other_file_reads_private_names_of_a_library():
    defined, read = names_defined_here(), []
    for file in SOURCES.rglob("*.py"):
        if file.name in ("compat.py", "fake_step.py"):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Attribute):
                names = [node.attr]
            elif isinstance(node, ast.keyword):
                names = [node.arg or ""]
            elif isinstance(node, ast.ImportFrom) and not str(node.module).startswith(("visper", "__")):
                names = [*str(node.module).split("."), *(alias.name for alias in node.names)]
            read += [f"{file.relative_to(SOURCES)}: {n}" for n in names if private(n) and n not in defined]
    assert not read


def test_every_private_method_of_the_trainer_that_is_overridden_is_listed():
    tree = ast.parse((SOURCES / "training" / "trainer.py").read_text(encoding="utf-8"))
    named = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    overridden = {name for name in named if private(name) and hasattr(Trainer, name)}
    assert overridden == set(compat.TRAINER_METHODS)


def test_a_block_mask_is_what_the_rule_says():
    mask = compat.flex_block_mask(lambda batch, head, query, key: query >= key, 256, torch.device("cpu"))
    assert mask.to_dense()[0, 0].tolist() == [[1, 0], [1, 1]]


def test_torch_reads_where_a_shard_begins(tmp_path):
    save_file({"a": torch.ones(2, 3)}, tmp_path / "1.safetensors", metadata=compat.shard_metadata({"a": [0, 0]}))
    save_file({"a": torch.zeros(1, 3)}, tmp_path / "2.safetensors", metadata=compat.shard_metadata({"a": [2, 0]}))
    state = {"a": torch.empty(3, 3)}
    dcp.load(state, storage_reader=HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    assert state["a"].tolist() == [[1.0] * 3, [1.0] * 3, [0.0] * 3]


def test_what_sees_operations_is_known():
    assert not compat.sees_operations()
    with compat.around_operations(lambda operation, args, kwargs: operation(*args, **kwargs)):
        assert compat.sees_operations()
    assert not compat.sees_operations()
