"""The training model of a run on fake tensors, and the micro-batches it is traced with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from fractions import Fraction
from functools import partial
from itertools import chain
from typing import Any

import torch
from PIL import Image
from torch import nn

from visper.common.console import Console
from visper.config import Run
from visper.data.chat import IGNORED
from visper.data.collator import Collator, Sample, Sizes
from visper.data.packing import PackingCollator
from visper.data.vlm import NOMINAL_SIZE, ModelInputs, image_blocks
from visper.distillation import Targets, TargetSpec
from visper.model import Student
from visper.model.parts import LLM
from visper.model.start import reads_as_stored, require_positions
from visper.planning.fake_step import (
    FakeTensorMode,
    KnownPositions,
    adamw,
    autocast,
    fake_parameters,
    state_of,
    step_activations,
)
from visper.planning.fewer_layers import FewLayers, layers_to_trace
from visper.planning.parameters import student_skeleton
from visper.planning.row_statistics import RowLength, Rows
from visper.training.assemble import build_training_model, set_trainable
from visper.training.attention import choose_attention
from visper.training.checkpoint import trainable_state
from visper.training.flops import Costs, FlopMeter
from visper.training.lora import add_updates
from visper.training.module import FORWARD_KEYS, TrainingModel
from visper.training.stages import PartCount, count_parts

FUSED = ("flash_attention_2", "flash_attention_3", "flex_attention")
"""Attention kernels that may be missing on the planning machine. They hold as much memory as torch's fused kernel."""
NF4 = (4 + 0.127) / 8
"""Bytes per weight under ``lora.quantize: 4bit``: NF4 with double quantization (arXiv 2305.14314, section 3)."""


class FakeRun:
    """The training model of a run, built once and traced once for each kind of step.

    Args:
        start: the run that provides its student (``parameters.starting_point``).
        specs: the shapes of the targets by task.

    Attributes:
        parts: parameter counts by part.
        weights, gradients, moments: bytes of parameters and buffers, of all gradients, of AdamW's state.
        saved: bytes of the weights in a checkpoint, which also holds ``moments``.
        read: bytes of the weights as a process reads them, before frozen parts are cast.
        layers: bytes of the LLM's decoder layers.
        num_layers, layer_parameters: the number of decoder layers, and the parameters of one.
        fake: the mode that made all fake tensors.

    Raises:
        ConfigError: a configuration cannot be found, or the run's parts do not fit together.
    """

    def __init__(self, run: Run, start: Run, specs: Mapping[str, TargetSpec]) -> None:
        attention = "sdpa" if run.optimization.attention in FUSED else run.optimization.attention
        optimization = run.optimization.model_copy(update={"attention": attention})
        self.run = run.model_copy(update={"optimization": optimization})
        self.student: Student = student_skeleton(start)
        # A configuration names the precision of the stored weights; all but a frozen LLM are read in float32.
        self.student.model.float()
        llm: Any = self.student.model.get_decoder()
        choose_attention(self.run, self.student)
        require_positions(self.student, run.data.max_tokens)
        with torch.device("meta"):
            add_updates(run.lora, self.student)
            self.model: TrainingModel = build_training_model(self.student, run.stage, run.distillation, specs)
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        fake_parameters(self.model, self.fake)
        set_trainable(self.model, run.stage, run.optimization, run.lora is not None, Console(quiet=True))
        self.parts: list[PartCount] = count_parts(self.model)
        self.layers = float(sum(p.nbytes for p in llm.layers.parameters()))
        self.num_layers = len(llm.layers)
        self.layer_parameters = sum(p.numel() for p in llm.layers[0].parameters())
        held = [*self.model.parameters(), *self.model.buffers()]
        self.weights = float(sum(tensor.nbytes for tensor in held))
        if run.lora is not None and run.lora.quantize is not None:
            self.weights -= _saved_by_quantizing(llm)
        self.gradients = float(sum(p.nbytes for p in self.model.parameters() if p.requires_grad))
        self.saved = float(sum(tensor.nbytes for tensor in trainable_state(self.model).values()))
        self.read = self.weights
        if run.lora is None or run.lora.quantize is None:
            half = {LLM: 2} if reads_as_stored(run) else {}
            self.read = float(sum(part.total * half.get(part.part, 4) for part in self.parts))
        self._optimizer = adamw(self.model)
        self.moments = float(sum(value.nbytes for value in state_of(self._optimizer)))
        self.model.train()
        self._decoder = llm
        self._kept = layers_to_trace(llm.layers, self.model.objective.layers if self.model.objective else ())
        self._meter = FlopMeter(Fraction(self.num_layers, len(self._kept)))
        self._activations: dict[tuple[int, bool, bool], float] = {}

    def activations(self, rows: Rows, micro_batch: int, checkpointing: float, accumulates: bool) -> float:
        """Bytes that the largest micro-batch of ``rows`` holds beyond weights, gradients, moments and targets.

        Traced with all layers recomputed and with none, and interpolated linearly. With half of the layers recomputed,
        this was 0.6 % above the traced value for ``llama3-8b-vit-l``'s IFT and 0.7 % for its PT.
        """
        every, none = (
            self._traced(rows, micro_batch, recomputed, accumulates) if share else 0.0
            for recomputed, share in ((True, checkpointing), (False, 1 - checkpointing))
        )
        return checkpointing * every + (1 - checkpointing) * none

    def _traced(self, rows: Rows, micro_batch: int, recomputed: bool, accumulates: bool) -> float:
        key = (micro_batch, recomputed, accumulates)
        if key not in self._activations:
            self.model.recompute_activations(float(recomputed))
            lengths = rows.largest_micro_batch(micro_batch, self.run.packed, self.run.seed)
            batch, sizes = fake_batch(lengths, self.student, self.model, self.run, self.fake)
            watch = self._watch(batch, sizes)
            self._activations[key] = step_activations(
                self.model, self._optimizer, batch, self.run, self.fake, accumulates, watch, self._few(accumulates)
            )
        return self._activations[key]

    def _few(self, accumulates: bool) -> FewLayers | None:
        if len(self._kept) == self.num_layers:
            return None
        layer = self._decoder.layers[0]
        gradient = 0 if accumulates else sum(p.nbytes for p in layer.parameters() if p.requires_grad)
        return FewLayers(self._decoder, self._kept, gradient)

    def row_flops(self, rows: Rows) -> float:
        """Model FLOPs of an average row: one forward and one backward pass, without teachers."""
        costs, sizes = self._average(rows)
        return costs.flops(sizes.tokens, sizes.pairs, sizes.supervised, sizes.image_tokens) / 16

    def recomputed_flops(self, rows: Rows) -> float:
        """The further FLOPs of an average row if all layers of the LLM are recomputed."""
        costs, sizes = self._average(rows)
        return costs.recomputation(sizes.tokens, sizes.pairs) / 16

    def _average(self, rows: Rows) -> tuple[Costs, Sizes]:
        """What the model's FLOPs are made of, and the sizes of 16 average rows."""
        batch, sizes = fake_batch(rows.average_micro_batch(16), self.student, self.model, self.run, self.fake)
        if self._meter.costs is None:  # no step has been traced yet
            with KnownPositions(self.fake), autocast(self.run), self._watch(batch, sizes)():
                self.model(**batch)
        assert self._meter.costs is not None
        return self._meter.costs, sizes

    def _watch(self, batch: Mapping[str, Any], sizes: Sizes) -> Callable[[], AbstractContextManager[None]]:
        return partial(self._meter.watch, self.model, batch["input_ids"].numel(), sizes)


def fake_batch(
    rows: Sequence[RowLength], student: Student, model: TrainingModel, run: Run, fake: FakeTensorMode
) -> tuple[dict[str, Any], Sizes]:
    """A micro-batch of rows of these lengths, as ``TrainingModel.forward`` takes it, and its sizes.

    It is padded or packed as ``run`` says. Its pool of targets holds a global batch.
    """
    task_tokens = [token for ids in student.task_token_ids.values() for token in ids]
    samples = []
    for row in rows:
        blocks, pixels, blank = _images(student, row.images, fake)
        shown = [[*block, *task_tokens, 0] for block in blocks]
        text = max(row.tokens - sum(map(len, shown)), 2)
        supervised = min(row.supervised, text - 1)
        ids = [0, *chain.from_iterable(shown), *[0] * (text - 1)]
        labels = [IGNORED] * (len(ids) - supervised) + [0] * supervised
        counts = tuple(block.count(student.image_token_id) for block in blocks)
        samples.append(Sample("fake", ids, labels, counts, pixels, blank))
    inputs = None if student.is_llava else ModelInputs(student.processor, student.image_token_id)
    padded = Collator(0, model_inputs=inputs)
    collated = model.with_positions(PackingCollator(padded) if run.packed else padded)(samples)
    batch: dict[str, Any] = {name: value for name, value in collated.items() if name in FORWARD_KEYS}
    images = sum(row.images for row in rows)
    if model.objective is not None:
        pool = max(images, run.optimization.global_batch)
        batch["targets"] = {
            name: _targets(images, pool, task.target.tokens, task.target.width, fake)
            for name, task in model.objective.tasks.items()
        }
    return {**batch, "num_tokens": 1, "num_images": 1}, collated["sizes"]


def _images(
    student: Student, count: int, fake: FakeTensorMode
) -> tuple[list[list[int]], torch.Tensor | None, tuple[Image.Image, ...]]:
    """Tokens and pixels of a row's images; for a model whose processor makes the pixels, tokens and blank images."""
    if not student.is_llava:
        blank = [NOMINAL_SIZE] * count
        texts = image_blocks(student.processor, blank) if count else []
        ids = [list(student.processor.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
        return ids, None, tuple(Image.new("RGB", size) for size in blank)
    side = int(student.model.config.vision_config.image_size)
    with fake:
        pixels = torch.empty(count, 3, side, side) if count else None
    return [[student.image_token_id] * student.num_image_tokens] * count, pixels, ()


def _targets(images: int, pool: int, tokens: int, width: int, fake: FakeTensorMode) -> Targets:
    with fake:
        everything = torch.empty(pool, tokens, width)
        own = everything[:images]
    return Targets(own, everything, torch.arange(images))


def _saved_by_quantizing(llm: nn.Module) -> float:
    linear = [module for name, module in llm.named_modules() if isinstance(module, nn.Linear) and "lora_" not in name]
    return sum(module.weight.nbytes - module.weight.numel() * NF4 for module in linear)
