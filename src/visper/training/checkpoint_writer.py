"""Writing checkpoints while training goes on.

A checkpoint's tensors are copied to the host, and torch's distributed checkpoints write them in the background: every
process its own shards as safetensors, and of what several hold each a part. Training waits for the copy alone. One
checkpoint is written at a time; it takes its place once all of it is on the disk.
"""

from __future__ import annotations

import logging
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future as TorchFuture

from visper.common.compat import shard_metadata
from visper.common.errors import TrainingError
from visper.common.files import flush
from visper.common.ranks import first_decides, naming_lost_processes
from visper.training import checkpoint

logger = logging.getLogger(__name__)
ONE_PROCESS = "torch.distributed is disabled, unavailable or uninitialized"
"""torch warns of what ``no_dist`` asks for, from the thread that writes."""
warnings.filterwarnings("ignore", ONE_PROCESS, UserWarning)


class ShardWriter(HuggingFaceStorageWriter):
    """torch's writer of safetensors, but each process writes its file from the tensors as they lie.

    torch joins them in memory first: twice their size, while no other thread of Python runs.
    """

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        """Writes this process's shards into one file and flushes it to the disk."""
        offsets, tensors = {}, {}
        for item in plan.items:
            tensor = planner.resolve_data(item)
            assert item.tensor_data is not None and isinstance(tensor, Tensor), f"'{item.index.fqn}' is not a tensor"
            offsets[item.index.fqn] = item.tensor_data.chunk.offsets
            tensors[item.index.fqn] = tensor.detach().contiguous()
        if tensors:
            file = Path(self.path) / f"shard-{plan.storage_data['shard_index']:05d}.safetensors"
            save_file(tensors, file, metadata=shard_metadata(offsets))
            flush(file)
        done: TorchFuture[list[WriteResult]] = TorchFuture()
        done.set_result([])  # metadata lie in the shards, so nothing is left to finish
        return done


class CheckpointWriter:
    """Writes the checkpoints of a run. All processes make one, and call its methods together unless said otherwise.

    Args:
        output: the run's folder.
        keep: how many checkpoints stay.
        first: whether this process puts checkpoints in their place.
        timeout: how long a process waits for one that is late.
    """

    def __init__(self, output: Path, keep: int, first: bool, timeout: timedelta) -> None:
        self.output, self.keep, self.first = output, keep, first
        # Its own group: the run's may have no backend for the host, and is busy with training's reductions.
        self._group: Any = dist.new_group(backend="gloo", timeout=timeout) if dist.is_initialized() else None
        self._completer = ThreadPoolExecutor(1)
        self._written: Any = None
        self._pending: Future[None] | None = None
        self._name = ""

    def write(self, state: dict[str, Any], folder: Path) -> None:
        """Copies ``state`` and begins to write it into a checkpoint's folder under staging.

        Raises:
            ProcessFailedError: a process has ended, or is later than the timeout.
        """
        place = folder / checkpoint.STATE
        if self.first:
            shutil.rmtree(place, ignore_errors=True)  # shards of an attempt that was killed
        if self._group is not None:
            with naming_lost_processes():
                dist.barrier(self._group)
        storage = ShardWriter(str(place), save_distributed=True)
        group = self._group
        self._written = dcp.async_save(state, storage_writer=storage, process_group=group, no_dist=group is None)

    def complete(self, name: str, best: str | None) -> None:
        """Lets the checkpoint take its place once it is written, and returns at once."""
        written, self._written, self._name = self._written, None, name

        def when_written() -> None:
            if written is not None:
                written.result()
            if self.first:
                checkpoint.complete(self.output, name, self.keep, best)

        self._pending = self._completer.submit(when_written)

    def failed(self) -> bool:
        """Whether this process knows by now that the checkpoint at hand cannot be written. Any process may call."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def wait(self) -> None:
        """Waits for the checkpoint at hand.

        Raises:
            TrainingError: it could not be written, on whichever process; the checkpoints before it stay.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        error = pending.exception()

        def tell() -> None:
            if isinstance(error, TrainingError):
                raise error
            if error is not None:
                raise TrainingError(
                    f"'{self._name}' could not be written ({_reason(error)}); the checkpoints before it are as they "
                    "were: make room or choose another disk, then add --resume"
                ) from error

        first_decides(tell)
        tell()

    def close(self) -> None:
        """Waits for the checkpoint at hand where a run ends by an error, which is not replaced by another one."""
        if self._pending is not None and self._pending.exception() is not None:
            logger.warning("'%s' could not be written: %s", self._name, _reason(self._pending.exception()))
        self._completer.shutdown()


def _reason(error: BaseException | None) -> str:
    """Why, in one line; of torch's collected failures the first, with its process."""
    if isinstance(error, CheckpointException):
        rank, (inner, _) = min(error.failures.items(), key=lambda item: item[0])
        return f"process {rank}: {inner}"
    return str(error)
