"""Converts a published checkpoint to a visper folder.

Layout of the output::

    model/          a plain LLaVA folder, as a stage writes it; transformers loads it without this package
    distillation/   (PT checkpoints) predictors, logit scales, query matrices and their run, as PT writes them
    probes/         (probe checkpoints, and PT without task tokens) heads with their own latents

Each has a manifest, which is verified when it is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from visper.common.errors import ConfigError
from visper.common.lock import new_folder
from visper.common.manifest import WEIGHTS_ONLY, write_manifest
from visper.config import save_run
from visper.model import TaskTokens, save_processor
from visper.model.hub import loading
from visper.published.config import read_published
from visper.published.names import (
    DISTILLATION,
    INPUT_TABLE,
    MODEL,
    OUTPUT_TABLE,
    PROBES,
    PUBLISHED_TOWER,
    QUERIES,
    TOWER,
    Report,
    Slot,
    account,
)
from visper.published.probes import PROBES_FILE, WEIGHTS_FILE
from visper.published.skeleton import Skeleton, converted_skeleton
from visper.published.weights import ShardWriter, Weights, fetch


def convert_published(source: str, output: str | Path, encoder: str | None = None) -> Report:
    """Converts a published checkpoint to a visper folder.

    Args:
        source: the checkpoint's folder or hub id.
        encoder: hub id or folder of the image encoder, in place of the id in the checkpoint's ``mm_vision_tower``. Its
            weights are read only if the checkpoint has no encoder weights.

    Raises:
        ConfigError: ``output`` exists; the checkpoint cannot be reached or read, or has another architecture; its
            parameters are not exactly those that its configuration describes.
    """
    out = Path(output)
    if out.exists():
        raise ConfigError(f"'{out}' exists: give a new folder, or remove it")
    folder = fetch(source)
    with loading("published checkpoint", source):
        weights = Weights.of(folder)
        inside = any(name.startswith(PUBLISHED_TOWER) for name in weights.shapes)
        published = read_published(folder, weights.shapes)
        skeleton = converted_skeleton(published, out, encoder, inside)
        slots = skeleton.slots()
    unused = account(weights.shapes, slots, folder, tower_elsewhere=not inside)
    report = Report(out, left_out={reason: len(names) for reason, names in unused.items()})
    if None in skeleton.heads:
        report.left_out["query matrices (task tokens are the means of their rows)"] = len(skeleton.heads[None])
    with new_folder(out) as partial:
        partial.mkdir()
        heads = _write_model(partial / MODEL, weights, slots, skeleton, inside)
        report.written[MODEL] = len(skeleton.state)
        for place, tensors in heads.items():
            (partial / place).mkdir()
            save_file(tensors, partial / place / WEIGHTS_FILE, metadata={"format": "pt"})
            report.written[place] = len(tensors)
        _write_settings(partial, skeleton)
        for place in (MODEL, *heads):
            # As in a stage's output, where 'distillation.tasks.TASK.target.model' of run.yaml may be edited.
            write_manifest(partial / place, WEIGHTS_ONLY if place == DISTILLATION else "*")
    if not inside:
        report.notes.append(f"the image encoder's weights come from '{encoder or published.config['mm_vision_tower']}'")
    return report


def _write_model(
    folder: Path, weights: Weights, slots: Mapping[str, Slot], skeleton: Skeleton, inside: bool
) -> dict[str, dict[str, Tensor]]:
    """Writes the model's shards, one per source file, and returns all other tensors, by folder and name."""
    folder.mkdir()
    sources = {file for name, file in weights.where.items() if name in slots and slots[name].folder == MODEL}
    writer = ShardWriter(folder, len(sources) + (not inside))
    heads: dict[str, dict[str, Tensor]] = {}
    tokens = _task_tokens(weights, slots, skeleton)
    for file in weights.files:
        shard: dict[str, Tensor] = {}
        wanted = [name for name, place in weights.where.items() if place == file and name in slots]
        for name, tensor in weights.tensors(file, wanted):
            place, own_name, shape = slots[name]
            if place is None:
                continue
            if place != MODEL:
                heads.setdefault(place, {})[own_name] = tensor.clone().reshape(skeleton.heads[place][own_name])
            elif own_name in (INPUT_TABLE, OUTPUT_TABLE):
                shard[own_name] = _grown(tensor, shape[0])
                if own_name == INPUT_TABLE and tokens is not None:
                    tokens.write_back(nn.Embedding.from_pretrained(shard[own_name]))
            else:
                shard[own_name] = tensor
        if shard:
            writer.write(shard)
    if not inside:
        writer.write({name: tensor for name, tensor in skeleton.state.items() if name.startswith(TOWER)})
    writer.finish()
    return heads


def _task_tokens(weights: Weights, slots: Mapping[str, Slot], skeleton: Skeleton) -> TaskTokens | None:
    names = {slot.name.removeprefix(QUERIES): name for name, slot in slots.items() if slot.name.startswith(QUERIES)}
    if not names:
        return None
    found = weights.read(names.values())
    return TaskTokens(skeleton.student.task_token_ids, {task: found[name] for task, name in names.items()})


def _grown(table: Tensor, rows: int) -> Tensor:
    """A copy with ``rows`` rows. The new rows are the mean of the old ones, as when a student is assembled."""
    mean = table.mean(dim=0, keepdim=True, dtype=torch.float32).to(table.dtype)
    return torch.cat([table, mean.expand(rows - len(table), -1)])


def _write_settings(partial: Path, skeleton: Skeleton) -> None:
    """Writes all files except weights."""
    model = skeleton.student.model
    model.config.save_pretrained(partial / MODEL)
    assert model.generation_config is not None
    model.generation_config.save_pretrained(partial / MODEL)
    save_processor(skeleton.student, partial / MODEL)
    if skeleton.run is not None:
        save_run(skeleton.run, partial / DISTILLATION / "run.yaml")
    if skeleton.probes:
        (partial / PROBES / PROBES_FILE).write_text(json.dumps(skeleton.probes, indent=1), encoding="utf-8")
