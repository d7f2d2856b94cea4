"""The next-token loss by itself; ``test_module`` compares its parts, fused and not, through the training model."""

import torch
from torch import nn

from visper.training.next_token import can_fuse, next_token_loss


def test_the_fused_head_is_used_in_plain_float32_only():
    states, head = torch.zeros(1, 4), nn.Linear(4, 8, bias=False)
    assert can_fuse(head, states) is hasattr(torch.nn.functional, "linear_cross_entropy")
    with torch.autocast("cpu", torch.bfloat16):
        assert not can_fuse(head, states)
    assert not can_fuse(head, states.bfloat16())
    assert not can_fuse(nn.Linear(4, 8), states)
    assert not can_fuse(head.to(torch.bfloat16), states)


def test_a_cap_bounds_the_logits_also_in_parts(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(4, 8, bias=False)
    states, wanted = 5 * torch.randn(6, 4, generator=generator), torch.randint(0, 7, (6,), generator=generator)
    logits = 0.5 * torch.tanh(head(states) / 0.5)
    expected = torch.nn.functional.cross_entropy(logits[:, :7], wanted, reduction="none")
    for at_once in (2048, 4):
        monkeypatch.setattr("visper.training.next_token.LOGIT_ROWS", at_once)
        found = next_token_loss(states, wanted, head, torch.tensor([7]), cap=0.5, each=True)
        torch.testing.assert_close(found, expected)
