"""One training step without memory or arithmetic: what it would hold at its peak, and how much it would compute.

The step's own modules run forward, backward and through recomputation on tensors that have shapes but no values
(``FakeTensorMode``), with autocast as in training. Every storage that comes alive is counted until it dies, so
activations, recomputation and logits need no formula of ours, whatever the LLM or the encoder.

Shape suffixes: B = rows, L = tokens, D = LLM width, T = supervised tokens, N = teacher tokens, E = teacher width.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

from visper.distillation import HiddenStateTap
from visper.distillation import heads as predictors
from visper.distillation.losses import info_nce_per_sample, smooth_l1_per_sample
from visper.training.module import LOGIT_ROWS, TrainingModel


@dataclass(frozen=True)
class StepShape:
    """The largest micro-batch: rows, tokens of its longest row (image and task tokens included), supervised tokens a
    row, and how many rows show an image."""

    rows: int
    tokens: int
    supervised: int
    images: int


@dataclass(frozen=True)
class Traced:
    """Bytes at the peak beyond the weights, gradients included; bytes alive at the end of the forward; operations, a
    multiplication and an addition counted as two, recomputation included."""

    peak: int
    kept: int
    operations: float


class _Alive(TorchDispatchMode):
    """Bytes of all storages made inside and not yet freed, the most there were, and the operations.

    (``FlopCounterMode`` keeps what a checkpointed layer recomputes alive: memory would be counted several times.)
    """

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.now = self.most = 0
        self.operations = 0.0
        self.seen: dict[int, Any] = {}
        self.known = known

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.operations += count(*args, **(kwargs or {}), out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.seen or key in self.known:
            return
        size = storage.nbytes()

        def freed(_: Any) -> None:
            del self.seen[key]
            self.now -= size

        self.seen[key] = weakref.ref(storage, freed)
        self.now += size
        self.most = max(self.most, self.now)


class _Attention(torch.autograd.Function):
    """What a fused attention kernel holds: its inputs, its output and a sum a row; never the matrix of scores."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return tuple(torch.empty_like(saved) for saved in ctx.saved_tensors[:3])


class _FusedAttention(contextlib.AbstractContextManager["_FusedAttention"]):
    """Puts ``_Attention`` in the place of ``scaled_dot_product_attention`` and counts its operations.

    A function mode would not do: it is off while a checkpointed layer is recomputed.
    """

    def __init__(self) -> None:
        self.operations = 0.0

    def __enter__(self) -> _FusedAttention:
        self._own = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = predictors.scaled_dot_product_attention = self._attend
        return self

    def __exit__(self, *_: object) -> None:
        F.scaled_dot_product_attention = predictors.scaled_dot_product_attention = self._own

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
        query, key, value = (part.to(dtype) for part in (query, key, value))
        forward = 2.0 * query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])
        learns = torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value))
        self.operations += forward * (3.5 if learns else 1.0)  # backward: five products, as torch's counter has it
        attended: Tensor = _Attention.apply(query, key, value)
        return attended


@contextlib.contextmanager
def without_values(*modules: nn.Module) -> Iterator[None]:
    """Inside, ``modules`` (on the meta device) are made of tensors that say they lie on the CPU and hold nothing."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        made: dict[int, Tensor] = {}
        for module in modules:
            _fill(module, made)
        yield


def _fill(module: nn.Module, made: dict[int, Tensor]) -> None:
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None and id(parameter) not in made:
                fresh = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                made[id(parameter)] = nn.Parameter(fresh, requires_grad=parameter.requires_grad)
            if parameter is not None:
                part._parameters[name] = made[id(parameter)]  # type: ignore[assignment]
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")


def trace_step(model: TrainingModel, shape: StepShape, half: bool, pool: int, accumulates: bool = False) -> Traced:
    """What a micro-batch of ``shape`` holds and computes, the pool of targets left out.

    Args:
        model: inside ``without_values``.
        half: bfloat16 autocast.
        pool: samples in the pool of targets.
        accumulates: the step has more micro-batches, so gradients of one before lie there already.
    """
    model.train()
    held = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    alive = _Alive(held)
    fused = _FusedAttention()
    targets = _targets(model, shape, pool)
    pixels = _pixels(model, shape) if shape.images else None
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = sum(parameter.nbytes for parameter in learning) if accumulates else 0
    for parameter in learning if accumulates else ():
        parameter.grad = torch.empty_like(parameter)
    with alive, fused:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = _loss(model, shape, pixels, targets)
        kept = alive.now
        loss.backward()
    for parameter in learning:
        parameter.grad = None
    return Traced(alive.most + gradients, kept, alive.operations + fused.operations)


def trace_forward(module: nn.Module, pixels: tuple[int, ...], dtype: torch.dtype) -> Traced:
    """The same of a frozen network that sees pictures of shape ``pixels``."""
    alive, fused = (
        _Alive({t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers())}),
        _FusedAttention(),
    )
    with torch.no_grad(), alive, fused:
        module(torch.empty(pixels, dtype=dtype))
    return Traced(alive.most, 0, alive.operations + fused.operations)


def _pixels(model: TrainingModel, shape: StepShape) -> Tensor:
    side = int(model.config.vision_config.image_size)
    return torch.empty(shape.images, 3, side, side)


def _targets(model: TrainingModel, shape: StepShape, pool: int) -> dict[str, tuple[Tensor, Tensor]]:
    tasks = model.objective.tasks if model.objective is not None else {}
    specs = {name: task.target for name, task in tasks.items()}
    return {
        name: (torch.empty(shape.images, s.tokens, s.width), torch.empty(max(pool, shape.images), s.tokens, s.width))
        for name, s in specs.items()
    }


def _loss(
    model: TrainingModel, shape: StepShape, pixels: Tensor | None, targets: dict[str, tuple[Tensor, Tensor]]
) -> Tensor:
    """``TrainingModel.forward`` without what depends on values: where the image and the supervised tokens lie."""
    student = model.student.model
    words = torch.zeros(shape.rows, shape.tokens, dtype=torch.long)
    embedded_BLD = model.student.get_input_embeddings()(words)
    if pixels is not None:
        features = torch.cat(list(student.get_image_features(pixel_values=pixels).pooler_output)).to(embedded_BLD)
        flat = embedded_BLD.flatten(0, 1)
        embedded_BLD = torch.cat((features[: len(flat)], flat[len(features) :])).view_as(embedded_BLD)
    layers = model.objective.layers if model.objective is not None else ()
    tap: Any = HiddenStateTap(student.language_model, layers) if layers else contextlib.nullcontext({})
    mask = torch.empty(shape.rows, 1, shape.tokens, shape.tokens, dtype=torch.bool)
    with tap as hidden:
        output = student.language_model(inputs_embeds=embedded_BLD, use_cache=False)
        states_TD = output.last_hidden_state.flatten(0, 1)[: shape.rows * shape.supervised]
        loss = _next_token_loss(model, states_TD + 0, words.flatten()[: len(states_TD)])
        if shape.images:
            loss = loss + _embedding_losses(model, shape, hidden, targets)
    del mask
    return loss


def _next_token_loss(model: TrainingModel, states_TD: Tensor, wanted_T: Tensor) -> Tensor:
    if len(states_TD) <= LOGIT_ROWS:
        return model._cross_entropy(states_TD, wanted_T)
    parts = zip(states_TD.split(LOGIT_ROWS), wanted_T.split(LOGIT_ROWS), strict=True)
    return torch.stack([checkpoint(model._cross_entropy, *part, use_reentrant=False) for part in parts]).sum()


def _embedding_losses(
    model: TrainingModel, shape: StepShape, hidden: dict[int, Tensor], targets: dict[str, tuple[Tensor, Tensor]]
) -> Tensor | float:
    objective = model.objective
    if objective is None:
        return 0.0
    assert model.task_tokens is not None
    terms = []
    own = torch.zeros(shape.images, dtype=torch.long)
    for name, task in objective.tasks.items():
        target, pool = targets[name]
        for layer in task.layers:
            keys = hidden[layer][: shape.images] + 0  # gathered, that is, copied
            matrix = task.queries == "matrix"
            query = model.task_tokens.queries[name][None] if matrix else keys.mean(1, keepdim=True)
            predicted = objective._predictor(name, layer, keys, query, None)
            terms.append(smooth_l1_per_sample(predicted, target).sum())
            terms.append(info_nce_per_sample(predicted, pool, own, objective.logit_scales[name]).sum())
    return torch.stack(terms).sum()
