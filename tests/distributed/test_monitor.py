"""Two gloo processes stop together, whichever of them saw the loss go wrong."""

import math
import os

import torch
import torch.distributed as dist
from accelerate import Accelerator

from tests.distributed.forked import run_forked
from visper.config import Monitor
from visper.training.monitor import NonFiniteLossError, RunMonitor


def watched(rank, folder):
    torch.set_num_threads(1)
    os.environ.update(WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    watch = RunMonitor(Monitor(), Accelerator(cpu=True))
    for number, loss in enumerate((1.0, math.nan if rank else 1.0), 1):
        watch.see({"loss": torch.tensor(loss)}, {"sample_ids": [f"row of {rank}"]})
        try:
            watch.settle(number)
        except NonFiniteLossError as error:
            (folder / f"{rank}").write_text(f"{number} {error}")
    dist.destroy_process_group()


def test_a_loss_gone_wrong_on_one_process_stops_both_and_names_both_rows(tmp_path):
    run_forked(watched, (tmp_path,), 2)
    for rank in ("0", "1"):
        said = (tmp_path / rank).read_text()
        assert said.startswith("2 ") and "row of 0" in said and "row of 1" in said
