"""A sharded run starts with exactly the weights that one process starts with, which only its first one has read."""

import os
import socket

import pytest
import torch
import torch.multiprocessing as mp
import yaml

from tests.distributed.test_training import make  # noqa: F401
from tests.vlms import save_vlm
from visper.common.console import Console
from visper.config import load_run
from visper.model import save_student
from visper.model.start import starting_student
from visper.training.parallel.fsdp import full_tensors
from visper.training.parallel.join import join_processes
from visper.training.run import build_model, build_student, build_targets

ACROSS_STATES = "tests.distillation.test_own_parts:AcrossStates"
QUIET = Console(quiet=True)


def start(recipe):
    """Builds the model as a run does. Returns the weights that this process has read, and all that it then has."""
    run = load_run(recipe)
    processes = join_processes(run.launch)
    torch.manual_seed(run.seed)
    student = build_student(run, processes, QUIET)
    read = sum(parameter.numel() for parameter in student.model.parameters() if not parameter.is_meta)
    teachers, _ = build_targets(run, student, QUIET)
    model = build_model(run, student, teachers, processes, QUIET)
    tensors = full_tensors(model.named_parameters(remove_duplicate=False), keep=True)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    needs = model.objective.need_all if model.objective else set()
    settings = model.logit_cap, needs, student.model.generation_config.to_dict()
    return read, {**tensors, **dict(model.named_buffers())}, trainable, settings


def _start_all(rank, port, recipes, folder):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", RANK=str(rank))
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2")
    for name, recipe in recipes.items():
        torch.save(start(recipe), f"{folder}/{name}-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_only_the_first_process_reads_weights_and_all_start_with_those_of_one_process(make, tmp_path):  # noqa: F811
    fsdp = {"launch": {"engine": "fsdp"}}
    save_student(starting_student(load_run(make("pt", "before"))), tmp_path / "before" / "model")
    recipes = {
        "frozen in bfloat16": make("pt", "pt", optimization={"precision": "bfloat16"}, **fsdp),
        "updates of a stage before": make("ift", "ift", start=tmp_path / "before", lora={"rank": 4}, **fsdp),
        "a model of its own": make("ift", "vlm", **fsdp),
    }
    settings = yaml.safe_load(recipes["a model of its own"].read_text())
    own = {"target": {"kind": "projector"}, "at": "image_tokens", "layers": [1], "loss": {"gram": 1.0}}
    settings["distillation"] = {"tasks": {"own": {**own, "head": {"kind": ACROSS_STATES}}}}
    settings["student"] = {"vlm": str(save_vlm(tmp_path / "gemma", "gemma4"))}
    recipes["a model of its own"].write_text(yaml.safe_dump(settings))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_start_all, (port, recipes, str(tmp_path)), nprocs=2)
    for name, recipe in recipes.items():
        everything, expected, trainable, settings = start(recipe)
        found = [torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=False) for rank in range(2)]
        assert [read for read, *_ in found] == [everything, 0], name
        assert settings[:2] == ((30.0, {ACROSS_STATES}) if name == "a model of its own" else (None, set()))
        for _, tensors, also_trainable, also_settings in found:
            assert (also_trainable, also_settings) == (trainable, settings), name
            assert tensors.keys() == expected.keys(), name
            for tensor, value in expected.items():
                assert tensors[tensor].dtype == value.dtype and torch.equal(tensors[tensor], value), (name, tensor)
