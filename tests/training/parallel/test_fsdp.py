"""Unsharding, as far as it shows in one process."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from visper.training.parallel.fsdp import unshard


@pytest.mark.skipif(torch.__version__ < "2.11", reason="torch 2.9 asks the GPU's driver, 2.10 was not tried")
def test_parameters_and_buffers_end_on_the_cpu():
    with FakeTensorMode():  # knows devices that are not there
        module = nn.Sequential(nn.Linear(2, 3, device="cuda"))
        module[0].register_buffer("embed_scale", torch.ones((), device="cuda"))
        unshard(module, keep=True)
        assert {str(value.device) for value in module.state_dict().values()} == {"cpu"}
        assert (module[0].weight / module[0].embed_scale).shape == (3, 2)
