"""What a checkpoint holds, put together from its shards."""

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from visper.training.checkpoint import STATE


def tensors_of(checkpoint: Path, part: str) -> dict[str, torch.Tensor]:
    """The tensors of ``weights`` or ``optimizer`` by name, such as ``llm.norm.weight.exp_avg``."""
    reader = HuggingFaceStorageReader(str(checkpoint / STATE))
    entries = reader.read_metadata().state_dict_metadata
    state = {name: torch.empty(e.size, dtype=e.properties.dtype) for name, e in entries.items()}
    dcp.load(state, storage_reader=reader, no_dist=True)
    return {name.removeprefix(f"{part}."): value for name, value in state.items() if name.startswith(f"{part}.")}
