"""Heads: predict a target's embeddings from hidden states, as a recipe's ``head`` (``config.Head``) says.

A ``TokenHead`` predicts one embedding from each state; ``ResamplerHead`` turns any number of states into as many
embeddings as the target has. A kind of head is a class here and an entry of ``config.kinds.HEADS``.

Shape suffixes: B = images, K = keys (hidden states), Q = queries, D = LLM width, N = teacher tokens, E = teacher width.
"""

from collections.abc import Collection
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn

from visper.common.errors import ConfigError
from visper.common.importing import import_named
from visper.config import Head, Position
from visper.config.kinds import check_arguments, head_place
from visper.distillation.resampler import PerceiverResampler
from visper.distillation.teachers.base import TargetSpec

ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "silu": nn.SiLU, "relu": nn.ReLU}


class TokenHead(nn.Module):
    """Base class of heads that predict one embedding from each state: ``[..., D]`` -> ``[..., E]``.

    A subclass is built with the LLM's width, the target's shape and its options as keyword arguments.
    """


class MlpHead(TokenHead):
    """``depth`` linear layers with an activation, a key of ``ACTIVATIONS``, between them; ``width`` is theirs."""

    def __init__(
        self, llm_width: int, target: TargetSpec, depth: int = 3, width: int = 2048, activation: str = "gelu"
    ) -> None:
        super().__init__()
        widths = [llm_width, *[width] * (depth - 1), target.width]
        layers: list[nn.Module] = []
        for at, (width_in, width_out) in enumerate(pairwise(widths)):
            layers += [ACTIVATIONS[activation]()] if at else []
            layers.append(nn.Linear(width_in, width_out))
        self.layers = nn.Sequential(*layers)

    def forward(self, states: Tensor) -> Tensor:
        predicted: Tensor = self.layers(states)
        return predicted


class LinearHead(MlpHead):
    """One linear layer."""

    def __init__(self, llm_width: int, target: TargetSpec) -> None:
        super().__init__(llm_width, target, depth=1)


class NoHead(TokenHead):
    """The states themselves are the prediction."""

    def __init__(self, llm_width: int, target: TargetSpec) -> None:
        super().__init__()

    def forward(self, states: Tensor) -> Tensor:
        return states


class ResamplerHead(nn.Module):
    """A resampler, optionally followed by an MLP.

    Args:
        llm_width: width of the hidden states (D).
        target: shape of the teacher's embedding.
        latents: number of queries that the resampler owns; 0: queries are passed to ``forward``.
        inner, mlp: see ``config.Head``.
        queries, num_queries: used by ``query_source`` and ``query_rows``.
        **shape: depth, heads, head_width and ff_mult of the resampler.
    """

    def __init__(
        self,
        llm_width: int,
        target: TargetSpec,
        latents: int = 0,
        *,
        inner: Literal["llm", "target"] = "target",
        mlp: bool = False,
        queries: Literal["matrix", "states"] | None = None,
        num_queries: int | None = None,
        **shape: int,
    ) -> None:
        super().__init__()
        self.tokens = target.tokens
        width = {"llm": llm_width, "target": target.width}[inner]
        self.resampler = PerceiverResampler(llm_width, width, target.width, num_latents=latents or None, **shape)
        width = target.width
        layers = [nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)] if mlp else []
        self.mlp = nn.Sequential(*layers)

    def forward(self, states_BKD: Tensor, queries_BQD: Tensor | None, key_mask_BK: Tensor | None = None) -> Tensor:
        """Predictions ``[B, N, E]``; arguments as in ``PerceiverResampler``, with queries passed to ``fit_queries``."""
        queries = None if queries_BQD is None else fit_queries(queries_BQD, self.tokens)
        return self.mlp(self.resampler(states_BKD, queries, key_mask_BK))


def build_head(
    spec: Head, llm_width: int, target: TargetSpec, at: Position = Position.TASK_TOKENS
) -> ResamplerHead | TokenHead:
    """A head with initial weights. Except at task tokens, a resampler with queries "matrix" owns its queries.

    Raises:
        ValueError: unknown kind or option, or a custom class that is not a ``TokenHead``.
    """
    try:
        kind = import_named(head_place(spec.kind))
    except (ImportError, ConfigError) as error:
        raise ConfigError(f"head '{spec.kind}' cannot be loaded: {error}") from error
    if kind is ResamplerHead:
        owns = at is not Position.TASK_TOKENS and query_source(spec, target) == "matrix"
        latents = target.tokens if owns else 0
        return ResamplerHead(llm_width, target, latents, **spec.options).requires_grad_(not spec.frozen)
    if not (isinstance(kind, type) and issubclass(kind, TokenHead)):
        raise ValueError(f"head '{spec.kind}' is not a subclass of visper.distillation.heads.TokenHead: make it one")
    check_arguments(f"head '{spec.kind}'", kind, ("llm_width", "target"), spec.options)
    head: TokenHead = kind(llm_width, target, **spec.options)
    return head.requires_grad_(not spec.frozen)


def fit_queries(queries_BQD: Tensor, tokens: int) -> Tensor:
    """``[B, tokens, D]``: queries tiled as a block if their number divides ``tokens``, else averaged and repeated."""
    rows = queries_BQD.shape[1]
    if rows == tokens:
        return queries_BQD
    if tokens % rows == 0:
        return queries_BQD.repeat(1, tokens // rows, 1)
    return queries_BQD.mean(1, keepdim=True).expand(-1, tokens, -1)


def query_source(spec: Head, target: TargetSpec) -> Literal["matrix", "states"]:
    """Option ``queries`` of a resampler; default: "states" for a target of one token, else "matrix"."""
    chosen: Literal["matrix", "states"] | None = spec.options.get("queries")
    return chosen or ("states" if target.tokens == 1 else "matrix")


def query_rows(spec: Head, target: TargetSpec, per_task: int) -> int:
    """Number of rows of a task's query matrix; ``per_task`` is its number of task tokens."""
    if spec.kind != "resampler":
        return per_task
    rows: int | None = spec.options.get("num_queries")
    if rows is not None:
        return rows
    return target.tokens if query_source(spec, target) == "matrix" else per_task


def check_head_fits(
    task: str,
    spec: Head,
    target: TargetSpec,
    at: Position = Position.TASK_TOKENS,
    per_task: int | None = None,
    losses: Collection[str] = (),
) -> None:
    """Raises ValueError if a head of ``spec`` cannot learn ``target`` from the states at ``at`` by these losses.

    ``per_task`` is the number of task tokens, None if it is not known.
    """
    if "gram" in losses and not target.own:
        _check_gram(task, target, per_task if at is Position.TASK_TOKENS and spec.kind != "resampler" else None)
    if spec.kind == "resampler":
        if target.width == 1 and spec.options.get("inner", "target") == "target":
            raise ValueError(
                f"task '{task}': a resampler whose inner width is the target's, one channel, normalizes away its "
                f"input: set 'distillation.tasks.{task}.head.inner' to llm"
            )
        has_matrix = at is Position.TASK_TOKENS
        _check_queries(task, spec, target, has_matrix, per_task if has_matrix else None)
    elif at is not Position.TASK_TOKENS and (target.grid is None or target.tokens == 1) and not target.own:
        raise ValueError(
            f"task '{task}': a target of {target.tokens} x {target.width} has no grid to map onto image tokens: set "
            f"'distillation.tasks.{task}.head.kind' to resampler, or use a teacher with patch features"
        )


def _check_gram(task: str, target: TargetSpec, predicted: int | None) -> None:
    """``predicted``: how many tokens the head predicts, None if as many as the target has."""
    if target.tokens == 1 or predicted == 1:
        what = "a target of one token has no pairs" if target.tokens == 1 else "a head at one task token predicts one"
        raise ValueError(
            f"task '{task}': loss 'gram' compares tokens of an image with each other, but {what}, so it would always "
            f"be 0: set 'distillation.tasks.{task}.loss' to cosine or smooth_l1"
        )


def _check_queries(task: str, spec: Head, target: TargetSpec, has_matrix: bool, per_task: int | None) -> None:
    rows, tokens, key = spec.options.get("num_queries"), target.tokens, f"distillation.tasks.{task}.head"
    if query_source(spec, target) == "states":
        if rows is not None and not has_matrix:
            raise ValueError(
                f"task '{task}': queries 'states' away from task tokens are one mean state: remove '{key}.num_queries'"
            )
        if tokens > 1:
            raise ValueError(
                f"task '{task}': queries 'states' predict one token, but the teacher's target has {tokens}: "
                f"set '{key}.queries' to 'matrix'"
            )
        return
    if not has_matrix and rows not in (None, tokens):
        raise ValueError(
            f"task '{task}': a resampler away from task tokens has one query for each of the target's {tokens} tokens, "
            f"not {rows}: remove '{key}.num_queries'"
        )
    if rows is not None and tokens > 1 and tokens % rows:
        raise ValueError(
            f"task '{task}': {rows} queries cannot give the teacher's {tokens} tokens: set '{key}.num_queries' to "
            f"{tokens} or a divisor of it"
        )
    if per_task is not None and query_rows(spec, target, per_task) % per_task:
        if tokens == 1:
            remedy = f"set '{key}.queries' to 'states'"
        elif rows is not None:
            remedy = f"set '{key}.num_queries' to a multiple of {per_task}, or remove it"
        else:
            remedy = (
                f"set the teacher's 'size' so that its number of tokens is a multiple of {per_task}, or "
                "'student.task_tokens.per_task' to a divisor"
            )
        raise ValueError(
            f"task '{task}': {query_rows(spec, target, per_task)} queries for the teacher's {tokens} tokens cannot be "
            f"divided evenly among {per_task} task tokens: {remedy}"
        )
