"""The main process receives what a loader process sends."""

import pickle
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch.multiprocessing import reductions
from torch.utils.data import DataLoader

from visper.data.sending import SMALL, SentBatch

BATCH = {
    "small": torch.arange(6).view(2, 3).T,
    "scalar": torch.tensor(3),
    "none": torch.empty(0, dtype=torch.long),
    "half": torch.ones(2, dtype=torch.bfloat16),
    "large": torch.arange(SMALL, dtype=torch.float32),
    "nested": {"mask": (torch.tensor([True, False]), None)},
    "names": ["a"],
}


def sent(items: Any) -> SentBatch:
    return SentBatch(BATCH)


def test_a_batch_arrives_as_it_was_sent() -> None:
    (arrived,) = DataLoader([0], num_workers=1, collate_fn=sent)
    assert type(arrived) is dict and arrived.keys() == BATCH.keys()
    for name in ("small", "scalar", "none", "half", "large"):
        assert arrived[name].dtype == BATCH[name].dtype and torch.equal(arrived[name], BATCH[name])
    mask, nothing = arrived["nested"]["mask"]
    assert mask.tolist() == [True, False] and nothing is None and arrived["names"] == ["a"]
    arrived["small"] += 1  # not read-only


def test_only_small_tensors_are_copied_into_the_message() -> None:
    shared: list[torch.Tensor] = []

    def reduced(tensor: torch.Tensor) -> Any:
        shared.append(tensor)
        return str, ("shared",)

    ForkingPickler.register(torch.Tensor, reduced)
    try:
        arrived = pickle.loads(ForkingPickler.dumps(SentBatch(BATCH | {"again": BATCH["large"]})))
    finally:
        ForkingPickler.register(torch.Tensor, reductions.reduce_tensor)
    assert [tensor.data_ptr() for tensor in shared] == [BATCH[name].data_ptr() for name in ("half", "large")]
    assert arrived["large"] is arrived["again"]  # as a teacher's images may be the student's
