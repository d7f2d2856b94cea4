"""The distillation objective: the losses of every task and tapped layer, summed (arXiv 2412.09585, section 3).

    sum over tasks t, layers l:  w_t * (mean of smooth-L1 + 0.3 * mean of InfoNCE)

The losses are in ``losses.py``, the predictors in ``heads.py``. Means are over the samples of the *global* batch that
have an image: each term here is a sum over local samples divided by that number, so that splitting a batch over
micro-batches or ranks changes no sum. Text-only samples contribute nothing. (The published code zeroes its masks in
place before the losses, and divides by all samples.)

Shape suffixes: B = rows, L = sequence, D = LLM width, R = rows with an image, K = keys, Q = queries, N = teacher
tokens, E = teacher width, P = samples in the pool.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from visper.config import Distillation, PredictorSpec
from visper.distillation.heads import EmbeddingPredictor, check_predictor, query_source
from visper.distillation.layout import KeyPlaces, TokenLayout
from visper.distillation.losses import info_nce_per_sample, smooth_l1_per_sample
from visper.distillation.targets import Targets
from visper.distillation.teachers.base import TargetSpec

SMOOTH_L1, CONTRASTIVE = "smooth_l1", "contrastive"
"""The two kinds of term: the last part of a term's name."""


@dataclass(frozen=True)
class DistilledTask:
    """One task of the objective: target shape, tapped layers (counted from 1), predictor architecture, loss weight."""

    target: TargetSpec
    layers: tuple[int, ...]
    predictor: PredictorSpec = field(default_factory=PredictorSpec)
    weight: float = 0.5

    @property
    def queries(self) -> Literal["matrix", "states"]:
        """Where its predictors' queries come from."""
        return query_source(self.predictor, self.target)


class EmbeddingDistillation(nn.Module):
    """Predicts teachers' embeddings from hidden states and computes their losses.

    Teachers are not part of it: their targets come with the batch.

    Args:
        tasks: what to distil.
        llm_width: width of the student's hidden states.
        llm_layers: number of its decoder layers.
        contrastive_weight: factor of the contrastive terms in ``total``.
        init_logit_scale: initial value of each task's logit scale.
        text_keys: predictors also read the text behind the image.

    Attributes:
        layers: every tapped layer, ascending.
        predictors: one per task and layer, named "depth_20".
        logit_scales: ``[1]`` per task.

    Raises:
        ValueError: a layer beyond the model, or a target that the task's predictor cannot produce.
    """

    def __init__(
        self,
        tasks: Mapping[str, DistilledTask],
        llm_width: int,
        llm_layers: int,
        contrastive_weight: float = 0.3,
        init_logit_scale: float = 2.0,
        text_keys: bool = True,
    ) -> None:
        super().__init__()
        for name, task in tasks.items():
            _check(name, task, llm_layers)
        self.tasks = dict(tasks)
        self.layers: tuple[int, ...] = tuple(sorted({layer for task in tasks.values() for layer in task.layers}))
        self.llm_width = llm_width
        self.contrastive_weight = contrastive_weight
        self.text_keys = text_keys
        self.recompute = False
        """Whether predictors are recomputed in the backward pass: their activations are as large as the LLM's."""
        self.predictors = nn.ModuleDict(
            {
                f"{name}_{layer}": EmbeddingPredictor(llm_width, task.target, task.predictor)
                for name, task in tasks.items()
                for layer in task.layers
            }
        )
        self.logit_scales = nn.ParameterDict(
            # One element, not a scalar: FSDP2 shards a parameter along its first dimension.
            {name: nn.Parameter(torch.full((1,), float(init_logit_scale))) for name in tasks}
        )

    @classmethod
    def from_config(
        cls, config: Distillation, targets: Mapping[str, TargetSpec], llm_width: int, llm_layers: int
    ) -> "EmbeddingDistillation":
        """The objective of a run; ``targets`` are the specs of its teachers, by task."""
        tasks = {
            name: DistilledTask(targets[name], task.layers, task.predictor, task.weight)
            for name, task in config.tasks.items()
        }
        return cls(tasks, llm_width, llm_layers, config.contrastive_weight, config.init_logit_scale, config.text_keys)

    def forward(
        self,
        hidden: Mapping[int, Tensor],
        layout: TokenLayout,
        queries: Mapping[str, Tensor],
        targets: Mapping[str, Targets],
        image_rows: Tensor,
        num_images: Tensor | int,
    ) -> dict[str, Tensor]:
        """This micro-batch's share of every term.

        Args:
            hidden: per tapped layer ``[B, L, D]``.
            layout: positions of image, task tokens and text.
            queries: per task its query matrix ``[Q, D]``; not read for predictors with queries "states".
            targets: per task, targets of the image rows and the pool; not read if there are no image rows.
            image_rows: ``[R]`` rows that have an image.
            num_images: samples with an image in the global batch.

        Returns:
            Term, such as "depth/20/smooth_l1" -> unweighted scalar. Without image rows each is a zero that depends on
            every parameter (DDP and ZeRO wait for their gradients) and whose gradient is exactly zero.
        """
        if not len(image_rows):
            return self._zero_terms(queries)
        terms: dict[str, Tensor] = {}
        for name, task in self.tasks.items():
            target = _target_of(name, targets, len(image_rows))
            predicted = self.predict(name, hidden, layout, queries, image_rows)
            for layer in task.layers:
                contrastive = info_nce_per_sample(predicted[layer], target.pool, target.labels, self.logit_scales[name])
                terms[f"{name}/{layer}/{SMOOTH_L1}"] = (
                    smooth_l1_per_sample(predicted[layer], target.own).sum() / num_images
                )
                terms[f"{name}/{layer}/{CONTRASTIVE}"] = contrastive.sum() / num_images
        return terms

    def predict(
        self,
        name: str,
        hidden: Mapping[int, Tensor],
        layout: TokenLayout,
        queries: Mapping[str, Tensor],
        image_rows: Tensor,
    ) -> dict[int, Tensor]:
        """Per tapped layer of task ``name``, the predicted embeddings ``[R, N, E]`` of the image rows."""
        task = self.tasks[name]
        places = layout.keys(name, image_rows, self.text_keys)
        own = layout.own_tokens(name, image_rows)
        predicted: dict[int, Tensor] = {}
        matrix = queries[name] if task.queries == "matrix" else None

        def embedding(layer: int, states_BLD: Tensor) -> Tensor:
            states_RLD = states_BLD[image_rows]
            query = matrix[None] if matrix is not None else _mean_state(states_RLD, own)
            return self._predictor(name, layer, _gathered(states_RLD, places), query, places.mask)

        for layer in task.layers:
            predicted[layer] = self._run(embedding, layer, hidden[layer])
        return predicted

    def _run(self, embedding: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """``embedding(*arguments)``; with ``recompute``, its activations are computed again for the gradient."""
        if self.recompute and torch.is_grad_enabled():
            again: Tensor = checkpoint(embedding, *arguments, use_reentrant=False, preserve_rng_state=False)
            return again
        return embedding(*arguments)

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of the terms, to be added to the next-token loss."""
        factors = {SMOOTH_L1: 1.0, CONTRASTIVE: self.contrastive_weight}
        parts = []
        for term, value in terms.items():
            name, _, kind = term.split("/")
            parts.append(self.tasks[name].weight * factors[kind] * value)
        return torch.stack(parts).sum()

    def _predictor(self, name: str, layer: int, states: Tensor, query: Tensor, mask: Tensor | None) -> Tensor:
        predictor = self.predictors[f"{name}_{layer}"]
        if not torch.is_autocast_enabled(states.device.type):
            # A student in bfloat16 may have predictors that train in float32.
            dtype = next(predictor.parameters()).dtype
            states, query = states.to(dtype), query.to(dtype)
        predicted: Tensor = predictor(states, query, mask)
        return predicted

    def _zero_terms(self, queries: Mapping[str, Tensor]) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        for name, task in self.tasks.items():
            state = self.logit_scales[name].new_zeros(1, 1, self.llm_width)
            query = queries[name][None] if name in queries else state
            # A forward pass over one state of zeros, in the order of a real one: ZeRO gathers weights when a module is
            # called, and reduces gradients in the order they arrive.
            predicted = {layer: self._run(self._predictor, name, layer, state, query, None) for layer in task.layers}
            for layer in task.layers:
                terms[f"{name}/{layer}/{SMOOTH_L1}"] = 0.0 * predicted[layer].float().sum()
                terms[f"{name}/{layer}/{CONTRASTIVE}"] = 0.0 * self.logit_scales[name].float().sum()
        return terms


def _check(name: str, task: DistilledTask, llm_layers: int) -> None:
    if not name.isidentifier():
        raise ValueError(f"task '{name}': names of tasks become parts of parameter names; use letters, digits and _")
    beyond = [layer for layer in task.layers if not 1 <= layer <= llm_layers]
    if beyond or len(set(task.layers)) != len(task.layers):
        raise ValueError(
            f"task '{name}' taps layers {list(task.layers)}, but the model has layers 1 to {llm_layers}, each to be "
            f"tapped once: set 'distillation.tasks.{name}.layers' accordingly"
        )
    check_predictor(name, task.predictor, task.target)


def _target_of(name: str, targets: Mapping[str, Targets], rows: int) -> Targets:
    if name not in targets:
        raise ValueError(
            f"the batch has targets of {list(targets)} but none of '{name}': give the targets of every task"
        )
    target = targets[name]
    if len(target.own) != rows:
        raise ValueError(
            f"task '{name}': {len(target.own)} targets for {rows} rows with an image: give one per row; leave rows "
            "with several images out of 'image_rows', or put each image into its own row"
        )
    return target


def _gathered(states_RLD: Tensor, places: KeyPlaces) -> Tensor:
    index_RKD = places.index[:, :, None].expand(-1, -1, states_RLD.shape[-1])
    return states_RLD.gather(1, index_RKD)


def _mean_state(states_RLD: Tensor, own_RL: Tensor) -> Tensor:
    weights = own_RL.to(states_RLD.dtype) / own_RL.sum(1, keepdim=True).to(states_RLD.dtype)
    return torch.einsum("rl,rld->rd", weights, states_RLD)[:, None]
