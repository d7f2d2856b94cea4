"""What sharded processes send each other in a step, and that they train the same as one whatever they send."""

import json
import os
import socket
from collections import Counter

import pytest
import torch
from transformers import TrainerCallback

from tests import tiny
from tests.distributed.forked import run_forked
from tests.distributed.test_training import (
    IMAGE_TOKENS,
    assert_equal_runs,
    cut_behind_step_2,
    gradients,
    logs,
    make,  # noqa: F401
    train,
    weights,
)
from visper.common.compat import around_operations
from visper.common.errors import ConfigError
from visper.config import load_run
from visper.training import trainer
from visper.training.parallel.fsdp import check_replicas
from visper.training.run import run_stage


class CountCollectives(TrainerCallback):
    """torch's collectives of each step, from its first micro-batch to the optimizer, by name."""

    def __init__(self):
        self.steps = []

    def on_step_begin(self, *args, **kwargs):
        self.steps.append(Counter())
        self.watch = around_operations(self.count)
        self.watch.__enter__()

    def count(self, operation, args, kwargs):
        if operation.namespace == "c10d":
            self.steps[-1][operation._opname] += 1
        return operation(*args, **kwargs)

    def on_pre_optimizer_step(self, *args, **kwargs):
        self.watch.__exit__(None, None, None)


def _train(rank, count, port, recipe, folder):
    torch.set_num_threads(1)
    trainer.known_peak = lambda device: 1e12  # FLOPs are counted, as on a known GPU
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(count), RANK=str(rank))
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(count))
    counter = None if folder is None else CountCollectives()
    run_stage(load_run(recipe), callbacks=[counter] if counter else [])
    if counter:
        torch.save(counter.steps, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def train_on_known_peak(recipe, processes, folder=None):
    """Trains in so many processes; with a folder, writes the collectives of each step there, by process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run_forked(_train, (processes, port, str(recipe), folder), processes)


def trained(recipe, processes, folder):
    """The collectives of each step of a run in so many processes, by name."""
    train_on_known_peak(recipe, processes, folder)
    return torch.load(folder / "0.pt", weights_only=False)


@pytest.mark.slow
def test_gradients_are_reduced_after_each_micro_batch_or_once_a_step_with_the_same_result(make, tmp_path):  # noqa: F811
    """With predictors, ranks that see no image, and forward passes between the steps that no backward pass follows."""
    held = tiny.write_rows(tmp_path / "held", images=3, text_rows=1, seed=5)
    settings = {
        "images": 3,
        "optimization": {"micro_batch": 1},
        "distillation": {"tasks": IMAGE_TOKENS},
        "evaluation": {"every": 1, "loss_on": [{"json": str(held / "rows.json"), "images": str(held / "images")}]},
    }
    one = make("ift", "one", **settings)
    train(one)
    groups = 4 + 1  # the decoder's layers, and everything else
    for once, reductions in ((False, 2 * groups), (True, groups)):
        two = make("ift", f"once-{once}", launch={"engine": "fsdp", "reduce_once": once}, **settings)
        steps = trained(two, 2, tmp_path)
        assert [step["_reduce_scatter_base_"] for step in steps] == [reductions] * 3
        assert_equal_runs(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("once", [False, True])
def test_two_copies_of_two_processes_equal_one_and_exchange_gradients_once_a_step(once, make, tmp_path):  # noqa: F811
    settings = {"images": 3, "optimization": {"global_batch": 8, "micro_batch": 1, "max_steps": 3}}
    one = make("vpt", "one", **settings)
    train(one)
    launch = {"engine": "fsdp", "replicas": 2, "reduce_once": once}
    four = make("vpt", "four", launch=launch, **settings)
    steps = trained(four, 4, tmp_path)
    groups = 4 + 1
    assert [step["_reduce_scatter_base_"] for step in steps] == [groups if once else 2 * groups] * 3
    assert [step["allreduce_"] for step in steps] == [1 + groups] * 3  # one is of counts
    assert_equal_runs(one, four)
    cut_behind_step_2(four, tmp_path / "away")  # two copies have saved, one process resumes
    train(four, "launch.replicas=1", "launch.engine=ddp", "launch.reduce_once=false", "--resume")
    assert_equal_runs(one, four)


@pytest.mark.slow
def test_sharded_layers_compile_each_alone_and_train_as_one_process_without(make):  # noqa: F811
    one = make("pt", "plain", images=3)
    train(one)
    compiled = {"compile": "aot_eager", "gradient_checkpointing": 0.5}
    two = make("pt", "compiled", images=3, optimization=compiled, launch={"engine": "fsdp"})
    train_on_known_peak(two, 2)
    assert_equal_runs(one, two)
    lines = map(json.loads, (two.with_suffix("") / "log.jsonl").read_text().splitlines())
    assert [0 < line["mfu"] < 1 for line in lines if "ntp" in line] == [True] * 3


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pt", "vpt"])
def test_shards_gathered_in_bfloat16_train_close_to_float32_and_stay_in_float32(stage, make):  # noqa: F811
    """Largest relative difference of a term seen 1.4e-3, of the gradients' norm 2.7e-3; one process differs as much."""
    exact = make(stage, "float32", images=3)
    train(exact)
    launch = {"processes": 2, "engine": "fsdp"}
    half = make(stage, "bfloat16", images=3, optimization={"precision": "bfloat16"}, launch=launch)
    train(half)
    for a, b in zip(logs(exact), logs(half), strict=True):
        assert b == pytest.approx(a, rel=1e-2)
        assert b["loss"] != a["loss"]
    assert {value.dtype for value in gradients(half).values()} == {torch.float32}
    assert {value.dtype for value in weights(half).values()} == {torch.bfloat16}


@pytest.mark.parametrize(("replicas", "each"), [(8, "one process of 8"), (3, "2.67 processes of 8")])
def test_copies_that_do_not_divide_the_processes_are_refused(replicas, each):
    with pytest.raises(ConfigError, match=f"gives each copy of the model {each}: set it to the number of nodes"):
        check_replicas(replicas, 8)
    check_replicas(2, 8)
