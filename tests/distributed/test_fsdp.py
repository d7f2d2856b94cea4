"""What sharded processes send each other in a step, and that they train the same as one whatever they send."""

import os
import socket
from collections import Counter

import pytest
import torch
import torch.multiprocessing as mp
from transformers import TrainerCallback

from tests import tiny
from tests.distributed.test_training import IMAGE_TOKENS, assert_equal_runs, make, train  # noqa: F401
from visper.common.compat import around_operations
from visper.config import load_run
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
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(count), RANK=str(rank))
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(count))
    counter = CountCollectives()
    run_stage(load_run(recipe), callbacks=[counter])
    torch.save(counter.steps, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def trained(recipe, processes, folder):
    """The collectives of each step of a run in so many processes, by name."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_train, (processes, port, str(recipe), str(folder)), nprocs=processes)
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
