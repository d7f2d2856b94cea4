"""A step of two processes makes each host wait for its GPU twice: for everyone's counts, and for loss and gradients."""

import json
import os
import socket

import pytest
import torch

from tests.distributed.forked import run_forked
from tests.training.test_host_waits import LAST, STEADY, settings_of, waits_of


def _worker(rank, port, settings, folder):
    torch.set_num_threads(1)
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in own.items()})
    found = waits_of(settings)
    (folder / f"{rank}.json").write_text(json.dumps(found))


@pytest.mark.parametrize("launch", [{}, {"engine": "fsdp"}])
@pytest.mark.parametrize("stage", ["pt", "ift"])
def test_a_step_waits_twice(stage, launch, tmp_path, tiny_llm, tiny_encoder):
    settings = settings_of(tmp_path, stage, tiny_llm, tiny_encoder, global_batch=16) | {"launch": launch}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run_forked(_worker, (port, settings, tmp_path), 2)
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        judged = {place: count for place, count in found.items() if place.startswith("monitor.py")}
        asked = {place: count for place, count in found.items() if place.startswith("global_batch.py")}
        assert found == judged | asked, found
        assert sum(judged.values()) == LAST - STEADY and sum(asked.values()) <= LAST - STEADY
