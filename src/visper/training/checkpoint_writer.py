"""Writes checkpoints in the background while training continues.

A checkpoint's tensors are copied to the host, and ``torch.distributed.checkpoint`` writes them in the background as
safetensors: each process writes its own shards and a part of the replicated tensors. Training waits for the copy only.
One checkpoint is written at a time; it is moved to its place once it is completely on disk.
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
from visper.common.files import atomic_path
from visper.common.ranks import first_decides, naming_lost_processes
from visper.training import checkpoint

logger = logging.getLogger(__name__)
ONE_PROCESS = "torch.distributed is disabled, unavailable or uninitialized"
"""torch's warning about ``no_dist``, which is set on purpose; it comes from the writing thread."""
warnings.filterwarnings("ignore", ONE_PROCESS, UserWarning)


class ShardWriter(HuggingFaceStorageWriter):
    """torch's safetensors writer, except that each process writes its file directly from the tensors.

    torch serializes them in memory first, which takes twice their size and blocks all other Python threads.
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
            with atomic_path(file) as partial:
                save_file(tensors, partial, metadata=shard_metadata(offsets))
        done: TorchFuture[list[WriteResult]] = TorchFuture()
        done.set_result([])  # the metadata is in the shards, so nothing is left to finish
        return done


class CheckpointWriter:
    """Writes the checkpoints of a run. Every process creates one and must call its methods, except ``failed``.

    Args:
        first: whether this process moves checkpoints to their place.
        timeout: how long a process waits for another one.
    """

    def __init__(self, output: Path, keep: int, first: bool, timeout: timedelta) -> None:
        self.output, self.keep, self.first = output, keep, first
        # A separate group: the default one may have no CPU backend, and is busy with training's reductions.
        self._group: Any = dist.new_group(backend="gloo", timeout=timeout) if dist.is_initialized() else None
        self._completer = ThreadPoolExecutor(1)
        self._written: Any = None
        self._pending: Future[None] | None = None
        self._name = ""

    def write(self, state: dict[str, Any], folder: Path) -> None:
        """Copies ``state`` and starts writing it into a checkpoint's folder under staging.

        Raises:
            ProcessFailedError: another process has ended or did not arrive within the timeout.
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
        """Schedules the move of the checkpoint to its place for when it is written; returns immediately."""
        written, self._written, self._name = self._written, None, name

        def when_written() -> None:
            if written is not None:
                written.result()
            if self.first:
                checkpoint.complete(self.output, name, self.keep, best)

        self._pending = self._completer.submit(when_written)

    def failed(self) -> bool:
        """Whether writing the current checkpoint has failed on this process so far. Any process may call."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def wait(self) -> None:
        """Waits until the current checkpoint is written.

        Raises:
            TrainingError: writing failed on some process; earlier checkpoints are kept.
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
                    f"'{self._name}' could not be written ({_reason(error)}); earlier checkpoints are unchanged: free "
                    "some space, then repeat the command (visper train: with --resume)"
                ) from error

        first_decides(tell)
        tell()

    def close(self) -> None:
        """Waits for the current checkpoint when a run ends; only logs a failure, so as not to hide the run's error."""
        if self._pending is not None and self._pending.exception() is not None:
            logger.warning("'%s' could not be written: %s", self._name, _reason(self._pending.exception()))
        self._completer.shutdown()


def _reason(error: BaseException | None) -> str:
    """The reason in one line; if torch collected failures of several processes, that of the lowest rank."""
    if isinstance(error, CheckpointException):
        rank, (inner, _) = min(error.failures.items(), key=lambda item: item[0])
        return f"process {rank}: {inner}"
    return str(error)
