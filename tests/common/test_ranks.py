"""Processes that cannot reach each other fail with a one-line error, without a traceback or a hang."""

import pytest
import torch

from visper.common.errors import ConfigError, ProcessFailedError
from visper.common.ranks import LAUNCHED, naming_lost_processes, require_gpu_each, require_nccl


def test_several_processes_on_gpus_need_nccl(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    require_nccl()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="built without NCCL"):
        require_nccl()
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    require_nccl()


@pytest.mark.parametrize(
    ("processes", "gpus", "launched", "refused"),
    [
        (8, 2, False, True),
        (8, 8, False, False),
        (2, 8, True, False),
        (8, 0, True, False),  # on the CPU
        (8, 1, False, False),  # the scheduler may have given each process one GPU
        (8, 1, True, True),
    ],
)
def test_no_two_processes_share_a_gpu(monkeypatch, processes, gpus, launched, refused):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.delenv(LAUNCHED, raising=False)
    if launched:
        monkeypatch.setenv(LAUNCHED, "1")
    if not refused:
        require_gpu_each()
        return
    with pytest.raises(ConfigError, match=rf"{processes} processes share {gpus} GPU") as found:
        require_gpu_each()
    assert found.value.shared  # one process prints it


def test_what_torch_says_of_a_lost_process_becomes_one_line(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    message = r"process 1 of 4 lost contact with the others \(Connection closed\)"
    with pytest.raises(ProcessFailedError, match=message), naming_lost_processes():
        raise RuntimeError("Connection closed\nby peer")
