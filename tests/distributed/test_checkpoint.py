"""Checkpoints of several processes: every tensor is there bit for bit, whoever reads it; a failed write ends all."""

import os
import socket
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.checkpoints import tensors_of
from visper.common.errors import ProcessFailedError, TrainingError
from visper.training import checkpoint
from visper.training.checkpoint_writer import CheckpointWriter, ShardWriter
from visper.training.parallel.fsdp import full_tensors


def unused_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(5, 7), nn.Linear(7, 3)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, values):
        return self.scale * self.two(self.one(values))


def model_and_optimizer(sharded):
    """Odd sizes, a parameter of one element, and two steps behind it."""
    torch.manual_seed(0)
    model = Model()
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for step in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.1 + step)
        optimizer.step()
    return model, optimizer


def everything(model, optimizer):
    """Weights and moments, unsharded, by name."""
    state = checkpoint.state_of(model, optimizer)
    moments = {f"{name}.{kind}": v for name, own in state["optimizer"].items() for kind, v in own.items()}
    return full_tensors([*state["weights"].items(), *moments.items()], keep=True)


def join(rank, port):
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    PartialState(cpu=True)


def worker(rank, port, folder, sharded, fails):
    join(rank, port)
    model, optimizer = model_and_optimizer(sharded)
    writer = CheckpointWriter(folder, 2, rank == 0, timedelta(minutes=5))
    staged = folder / checkpoint.FOLDER / checkpoint.STAGING / "checkpoint-1"
    staged.mkdir(parents=True, exist_ok=True)
    if fails and rank == 1:

        def full(*_):
            raise OSError(28, "No space left on device")

        ShardWriter.write_data = full
    writer.write(checkpoint.state_of(model, optimizer), staged)
    saved = everything(model, optimizer)
    with torch.no_grad():  # training goes on: the copy must not move
        for parameter in model.parameters():
            parameter.mul_(2)
    writer.complete("checkpoint-1", None)
    said = ""
    try:
        writer.wait()
        place = folder / checkpoint.FOLDER / "checkpoint-1"
        checkpoint.load_weights(model, place)
        checkpoint.load_optimizer(model, optimizer, place)
        torch.save([saved, everything(model, optimizer)], folder / f"{rank}.pt")
    except TrainingError as error:
        said = str(error)
    (folder / f"{rank}.txt").write_text(said)
    writer.close()


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "replicated"])
def test_every_number_of_processes_reads_what_two_wrote(sharded, tmp_path):
    torch.multiprocessing.spawn(worker, (unused_port(), tmp_path, sharded, False), nprocs=2)
    for rank in range(2):
        saved, found = torch.load(tmp_path / f"{rank}.pt")
        assert saved.keys() == found.keys() and all(torch.equal(saved[name], found[name]) for name in saved)
    place = tmp_path / checkpoint.FOLDER / "checkpoint-1"
    model, optimizer = model_and_optimizer(sharded=False)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    checkpoint.load_weights(model, place)
    checkpoint.load_optimizer(model, optimizer, place)
    alone = everything(model, optimizer)
    assert alone.keys() == saved.keys() and all(torch.equal(saved[name], alone[name]) for name in saved)
    assert torch.equal(tensors_of(place, "optimizer")["one.weight.exp_avg"], saved["one.weight.exp_avg"])
    shards = list((place / checkpoint.STATE).glob("*.safetensors"))
    assert len(shards) == 2, "each process writes a part"


@pytest.mark.slow
def test_a_disk_that_fills_under_one_process_ends_both_and_completes_nothing(tmp_path):
    torch.multiprocessing.spawn(worker, (unused_port(), tmp_path, True, True), nprocs=2)
    for rank in range(2):
        said = (tmp_path / f"{rank}.txt").read_text()
        assert "'checkpoint-1' could not be written (process 1" in said and "No space left" in said
    assert not (tmp_path / checkpoint.FOLDER / "checkpoint-1").exists()


def late(rank, port, folder):
    """The second process comes to no checkpoint."""
    join(rank, port)
    writer = CheckpointWriter(folder, 2, rank == 0, timedelta(seconds=2))
    if rank == 0:
        with pytest.raises(ProcessFailedError, match="process 0 of 2 lost contact"):
            writer.write({}, folder)
        (folder / "said").touch()
    else:
        while not (folder / "said").exists():
            time.sleep(0.1)
    writer.close()


@pytest.mark.slow
def test_a_process_that_does_not_come_is_waited_for_as_long_as_the_run_says(tmp_path):
    torch.multiprocessing.spawn(late, (unused_port(), tmp_path), nprocs=2)
    assert (tmp_path / "said").exists()
