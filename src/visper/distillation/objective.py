"""The distillation objective: the losses of every task and tapped layer, summed (arXiv 2412.09585, section 3).

    sum over tasks t, layers l:  w_t * sum over losses k:  a_tk * (mean of loss k)

The published method uses smooth-L1 + 0.3 InfoNCE at task tokens. Losses are in ``losses.py``, heads in ``heads.py``.
Means are over the images of the *global* batch: each term is a sum over the local images divided by the global number
of images, so that its total does not depend on the split into micro-batches and ranks. Text-only samples contribute
nothing. (The published code zeroes its masks in place before the losses, and divides by all samples.)

Shape suffixes: B = rows, L = sequence, D = LLM width, S = images, K = positions read of an image, Q = queries, T =
image tokens of all images, M = targets, N = teacher tokens, E = teacher width, P = images in the pool.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from visper.common.errors import ConfigError
from visper.config import Distillation, Position
from visper.config.kinds import loss_name
from visper.distillation.alignment import laid_on_grid, laid_on_tokens, pooled
from visper.distillation.heads import ResamplerHead, build_head, query_source
from visper.distillation.layout import Positions, TokenLayout
from visper.distillation.losses import info_nce, loss_named
from visper.distillation.own_parts import try_own_parts
from visper.distillation.reading import Reading, reading_of, readings_of
from visper.distillation.targets import Targets
from visper.distillation.task import CONTRASTIVE, PROJECTED, DistilledTask, check_task
from visper.distillation.teachers.base import TargetSpec


class EmbeddingDistillation(nn.Module):
    """Predicts targets from hidden states and computes their losses.

    Teachers are not part of this module: their targets come with the batch.

    Args:
        init_logit_scale: initial value of each task's logit scale.
        text_keys: whether resamplers at task tokens also read the text after the image.
        counts: the numbers of image and task tokens, if they are known, for the trial of the user's own heads.

    Attributes:
        layers: every tapped layer, ascending; includes ``PROJECTED`` if a task reads the projector.
        predictors: one head per task and layer, named "depth_20", or one per task, named "depth_shared".
        logit_scales: ``[1]`` per task with InfoNCE.

    Raises:
        ValueError: the model lacks a tapped layer, a task's head cannot predict its target, or a head or loss of the
            user's own does not work.
    """

    def __init__(
        self,
        tasks: Mapping[str, DistilledTask],
        llm_width: int,
        llm_layers: int,
        init_logit_scale: float = 2.0,
        text_keys: bool = True,
        counts: Collection[int] = (),
    ) -> None:
        super().__init__()
        for name, task in tasks.items():
            check_task(name, task, llm_width, llm_layers)
        self.tasks = dict(tasks)
        tapped = {layer for task in tasks.values() for layer in task.tapped}
        tapped |= {PROJECTED for task in tasks.values() if task.own == "projector"}
        self.layers: tuple[int, ...] = tuple(sorted(tapped))
        self._factors = {
            _term(name, layer, kind): (name, factor)
            for name, task in tasks.items()
            for layer in task.tapped
            for kind, factor in task.loss.items()
        }
        self._losses = {kind: loss_named(kind) for task in tasks.values() for kind in task.loss if kind != CONTRASTIVE}
        self.llm_width = llm_width
        self.text_keys = text_keys
        self.recompute = False
        """Whether to recompute heads in the backward pass; their activations are as large as the LLM's."""
        self.need_all: set[str] = set()
        """The user's own losses and heads that need every token of every image, see ``own_parts``."""
        self.predictors = nn.ModuleDict()
        for name, task in tasks.items():
            for layer in task.tapped:
                if task.head_name(name, layer) not in self.predictors:
                    head = build_head(task.head, llm_width, task.target, task.at)
                    self.predictors[task.head_name(name, layer)] = head
                    if layer == task.tapped[0]:
                        self.need_all |= try_own_parts(name, task, head, self._losses, llm_width, counts)
        scaled = [name for name, task in tasks.items() if CONTRASTIVE in task.loss]
        # One element, not a scalar: FSDP2 shards a parameter along its first dimension.
        self.logit_scales = nn.ParameterDict(
            {name: nn.Parameter(torch.full((1,), float(init_logit_scale))) for name in scaled}
        )

    @classmethod
    def from_config(
        cls,
        config: Distillation,
        targets: Mapping[str, TargetSpec],
        llm_width: int,
        llm_layers: int,
        counts: Collection[int] = (),
    ) -> EmbeddingDistillation:
        """The objective of a run; ``targets`` has the shape of each task's target."""
        tasks = {name: DistilledTask.of(task, targets[name]) for name, task in config.tasks.items()}
        return cls(tasks, llm_width, llm_layers, config.init_logit_scale, config.text_keys, counts)

    @property
    def reads_encoder(self) -> bool:
        """Whether a task's target is the input of the student's projector."""
        return any(task.own == "encoder" for task in self.tasks.values())

    def forward(
        self,
        hidden: Mapping[int, Tensor],
        readings: Mapping[str, Reading],
        queries: Mapping[str, Tensor],
        targets: Mapping[str, Targets],
        num_images: Tensor | int,
        encoded_TE: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """This micro-batch's share of every term.

        Args:
            hidden: tapped layer -> ``[B, L, D]``.
            readings: the result of ``read``; empty if there are no images.
            queries: task -> query matrix ``[Q, D]``, for heads with queries "matrix".
            targets: task with a teacher -> targets of the local images and the pool; unused if there are no images.
            num_images: number of images in the global batch.
            encoded_TE: input of the projector, one row per image token, for target "encoder".

        Returns:
            Term name, such as "depth/20/smooth_l1", -> unweighted scalar. Without images the terms are zeros that
            depend on all parameters with gradients of exactly zero, because DDP and ZeRO wait for these gradients.
        """
        if not readings:
            return self._zero_terms(queries, hidden)
        terms: dict[str, Tensor] = {}
        for name, task in self.tasks.items():
            reading = readings[name]
            images = len(reading.positions.rows)
            if task.own is None:
                given = _target_of(name, task, targets, images)
                target = self._fitted(task, given.own, reading)
            else:
                given, target = None, _own_target(task, reading.positions, hidden, encoded_TE)
            pool, mask = self._common_pool(task, given, reading), _loss_mask(task, reading)
            self._require_all(name, task, reading, mask)
            predicted = self._predicted(name, hidden, queries, reading)
            for layer in task.tapped:
                for kind in task.loss:
                    if kind == CONTRASTIVE:
                        assert given is not None
                        value = self._contrastive(name, predicted[layer], given, pool, reading)
                    else:
                        value = self._losses[kind](predicted[layer], target, mask)
                    terms[_term(name, layer, kind)] = value.sum() / num_images
        return terms

    def _require_all(self, name: str, task: DistilledTask, reading: Reading, mask: Tensor | None) -> None:
        """Raises ConfigError if an own part that needs every token gets images that lack some."""
        ignoring = self.need_all & task.loss.keys()
        if ignoring and mask is not None and not mask.all():
            raise ConfigError(
                f"task '{name}': loss '{min(ignoring)}' ignores its mask, but not all tokens of this batch count: "
                "leave out those where the mask is False (docs/extending.md has an example)"
            )
        if task.head.kind in self.need_all and reading.positions.mask is not None:
            raise ConfigError(
                f"task '{name}': a prediction of head '{task.head.kind}' reads several states of an image, and cannot "
                "know which are padding, but the images of this batch have different numbers of tokens: predict from "
                "each state alone, or use images of one size"
            )

    def read(self, layout: TokenLayout) -> dict[str, Reading]:
        """The positions that each task reads in a batch: ``readings`` of ``forward``."""
        return readings_of(self.tasks, layout, self.text_keys)

    def predict(
        self, name: str, hidden: Mapping[int, Tensor], layout: TokenLayout, queries: Mapping[str, Tensor]
    ) -> dict[int, Tensor]:
        """Tapped layer of task ``name`` -> predicted embeddings ``[S, N, E]`` of the images, on the target's grid."""
        task, reading = self.tasks[name], reading_of(self.tasks[name], name, layout, self.text_keys)
        predicted = self._predicted(name, hidden, queries, reading)
        if reading.places is None or task.own is not None:
            return predicted
        return {layer: laid_on_grid(value, task.target, reading.places) for layer, value in predicted.items()}

    @property
    def term_names(self) -> tuple[str, ...]:
        """The names of all terms, such as ``depth/20/smooth_l1``."""
        return tuple(self._factors)

    def total(self, terms: Mapping[str, Tensor], progress: float = 0.0) -> Tensor:
        """The weighted sum of the terms, to be added to the next-token loss.

        Args:
            progress: share of the steps that are done, for tasks with a schedule.
        """
        weights = {name: task.weight_at(progress) for name, task in self.tasks.items()}
        parts = []
        for term, value in terms.items():
            name, factor = self._factors[term]
            parts.append(weights[name] * factor * value)
        return torch.stack(parts).sum()

    def _predicted(
        self, name: str, hidden: Mapping[int, Tensor], queries: Mapping[str, Tensor], reading: Reading
    ) -> dict[int, Tensor]:
        """Layer -> predictions, ``[S, N, E]`` from a resampler or ``[S, K, E]`` from a token head."""
        task = self.tasks[name]
        matrix = queries[name][None] if task.needs_matrix else None

        def embedding(layer: int, states_BLD: Tensor) -> Tensor:
            query = matrix if reading.chosen is None else _mean_state(states_BLD, reading)
            predicted = self._head(name, layer, reading.positions.gather(states_BLD), query, reading.positions.mask)
            pools = task.at is Position.TASK_TOKENS and task.head.kind != "resampler"
            return pooled(predicted, min(predicted.shape[1], task.target.tokens)) if pools else predicted

        return {layer: self._run(embedding, layer, hidden[layer]) for layer in task.tapped}

    def _fitted(self, task: DistilledTask, target_MNE: Tensor, reading: Reading, image: int | None = None) -> Tensor:
        """Targets in the shape of the predictions; with ``image``, all in the shape of that image's prediction."""
        if task.head.kind == "resampler":
            return target_MNE
        if reading.places is not None:
            return laid_on_tokens(target_MNE, task.target, reading.places, image)
        return pooled(target_MNE, min(reading.positions.index.shape[1], task.target.tokens))

    def _common_pool(self, task: DistilledTask, given: Targets | None, reading: Reading) -> Tensor | None:
        """The pool in the shape of the predictions, computed once for all layers.

        None if the pool is unused, or if images have different places, so that each needs its own form of the pool.
        """
        alike = reading.places is None or reading.places.side is not None
        if given is None or CONTRASTIVE not in task.loss or not alike:
            return None
        return self._fitted(task, given.pool, reading, 0)

    def _contrastive(
        self, name: str, predicted_SKE: Tensor, given: Targets, pool: Tensor | None, reading: Reading
    ) -> Tensor:
        task, scale, mask = self.tasks[name], self.logit_scales[name], _loss_mask(self.tasks[name], reading)
        if pool is not None:
            return info_nce(predicted_SKE, pool, given.labels, scale, mask, given.same)
        # The images' places differ: compare each image with the pool mapped onto its own tokens.
        values = []
        for at in range(len(predicted_SKE)):
            own_pool, own = self._fitted(task, given.pool, reading, at), slice(at, at + 1)
            seen = None if mask is None else mask[own]
            same = None if given.same is None else given.same[own]
            values.append(info_nce(predicted_SKE[own], own_pool, given.labels[own], scale, seen, same))
        return torch.cat(values)

    def _run(self, embedding: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """``embedding(*arguments)``; with ``recompute``, its activations are recomputed in the backward pass."""
        if self.recompute and torch.is_grad_enabled():
            # The default keeps the state of the random numbers: a head of the user's may have dropout.
            again: Tensor = checkpoint(embedding, *arguments, use_reentrant=False)
            return again
        return embedding(*arguments)

    def _head(self, name: str, layer: int, states: Tensor, query: Tensor | None, mask: Tensor | None) -> Tensor:
        head = self.predictors[self.tasks[name].head_name(name, layer)]
        if not torch.is_autocast_enabled(states.device.type):
            # A student in bfloat16 may have heads that are trained in float32.
            dtype = next((parameter.dtype for parameter in head.parameters()), torch.float32)
            states, query = states.to(dtype), None if query is None else query.to(dtype)
        predicted: Tensor = head(states, query, mask) if isinstance(head, ResamplerHead) else head(states)
        return predicted

    def _zero_terms(self, queries: Mapping[str, Tensor], hidden: Mapping[int, Tensor]) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        for name, task in self.tasks.items():
            state = next(iter(hidden.values())).new_zeros((1, 1, self.llm_width), dtype=torch.float32)
            query: Tensor | None = queries[name][None] if name in queries else state
            if task.head.kind == "resampler" and task.at is not Position.TASK_TOKENS:
                query = state if query_source(task.head, task.target) == "states" else None
            # Run the heads on one state of zeros, in the order of a real forward pass: ZeRO gathers weights when a
            # module is called, and reduces gradients in the order they arrive.
            predicted = {layer: self._run(self._head, name, layer, state, query, None) for layer in task.tapped}
            for layer in task.tapped:
                for kind in task.loss:
                    zero = 0.0 * predicted[layer].float().sum()
                    scaled = kind == CONTRASTIVE
                    terms[_term(name, layer, kind)] = zero + 0.0 * self.logit_scales[name].sum() if scaled else zero
        return terms


def _term(name: str, layer: int, kind: str) -> str:
    return f"{name}/{layer}/{loss_name(kind)}"


def _target_of(name: str, task: DistilledTask, targets: Mapping[str, Targets], images: int) -> Targets:
    if name not in targets:
        raise ValueError(
            f"the batch has targets of {list(targets)} but none of '{name}': give the targets of every task"
        )
    found, expected = tuple(targets[name].own.shape), (images, task.target.tokens, task.target.width)
    if found != expected:
        raise ValueError(
            f"task '{name}': the targets are {found}, expected {expected}: give one per image, in the shape that the "
            "task was attached with"
        )
    return targets[name]


def _own_target(
    task: DistilledTask, positions: Positions, hidden: Mapping[int, Tensor], encoded_TE: Tensor | None
) -> Tensor:
    """``[S, K, E]``: features of the student's own encoder or projector at the image tokens."""
    if task.own == "projector":
        return positions.gather(hidden[PROJECTED]).detach()
    assert encoded_TE is not None, "the caller must tap the projector's input"
    slots = positions.index.numel()
    tokens = slots if positions.real is None else len(positions.real)
    if len(encoded_TE) != tokens:
        raise ValueError(
            f"the encoder gave {len(encoded_TE)} features for {tokens} image tokens: target 'encoder' needs one for "
            "each; use target 'projector'"
        )
    target = encoded_TE.detach()
    if positions.real is not None:
        target = target.new_zeros(slots, target.shape[-1]).index_copy(0, positions.real, target)
    return target.unflatten(0, positions.index.shape)


def _loss_mask(task: DistilledTask, reading: Reading) -> Tensor | None:
    reads_tokens = task.head.kind != "resampler" and task.at is not Position.TASK_TOKENS
    return reading.mask if reads_tokens else None


def _mean_state(states_BLD: Tensor, reading: Reading) -> Tensor:
    """``[S, 1, D]``: the mean of each image's chosen states, used as its query."""
    chosen_SL = reading.chosen
    assert chosen_SL is not None
    weights = chosen_SL.to(states_BLD.dtype) / chosen_SL.sum(1, keepdim=True).to(states_BLD.dtype)
    if len(states_BLD) == 1:  # a packed row is not copied for each of its images
        return (weights @ states_BLD[0])[:, None]
    return torch.einsum("sl,sld->sd", weights, states_BLD[reading.positions.rows])[:, None]
