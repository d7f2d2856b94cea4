"""Distillation in TRL's SFTTrainer: two processes (gloo, CPU) train as one."""

import os
import socket

import pytest
import torch

pytest.importorskip("trl")

from tests.distributed.forked import run_forked
from tests.training import test_mixin as one
from tests.vlms import save_vlm

ROWS = {"images everywhere": one.ROWS, "a process without images": [one.ROWS[1], *[one.row(answer="x")] * 3]}


def _worker(rank, port, student, folder):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", RANK=str(rank))
    os.environ.update(LOCAL_RANK=str(rank))
    for name in ROWS:
        torch.save(_train(student, folder, name, 2, seed=rank), f"{folder}/{name}-{rank}.pt")
    torch.distributed.destroy_process_group()


def _train(student, folder, name, processes, seed=0):
    trainer = one.make_trainer(
        student,
        folder,
        rows=ROWS[name],
        kind=one.DistillationAlone,
        seed=seed,  # other heads in each process, until they are made equal
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2 // processes,
        max_steps=3,
        optim="adamw_torch",
        learning_rate=1e-3,
        max_grad_norm=1.0,
        ddp_find_unused_parameters=True,  # one process has no image; set by newer versions of TRL
    )
    trainer.train()
    return one.weights_of(trainer), one.terms_of(trainer)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    student = save_vlm(folder / "student", "qwen3_vl")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run_forked(_worker, (port, str(student), str(folder)), 2)
    ranks = {name: [torch.load(folder / f"{name}-{rank}.pt") for rank in range(2)] for name in ROWS}
    return {name: (_train(student, folder, name, 1), *found) for name, found in ranks.items()}


@pytest.mark.parametrize("name", ROWS)
def test_two_processes_train_as_one(trained, name):
    (weights, terms), (weights_0, terms_0), (weights_1, _) = trained[name]
    for before, after in zip(terms, terms_0, strict=True):
        assert before == pytest.approx(after, rel=1e-4)
    for parameter, value in weights.items():
        assert torch.equal(weights_0[parameter], weights_1[parameter]), parameter
        torch.testing.assert_close(weights_0[parameter], value, rtol=1e-4, atol=1e-5, msg=parameter)
