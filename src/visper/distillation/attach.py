"""Distillation for any vision-language model of transformers, in your own training loop.

It needs three facts about the model: its decoder layers, the id of its image token, the width of its hidden states.
Image positions are read from the token ids, so images may have any size, any tiles and separators.

    distiller = attach(model, {"depth": DistilledTask(teacher.spec, layers=(8, 20))})
    with distiller.tap() as hidden:
        output = model(**batch)
        terms = distiller(hidden, batch["input_ids"], batch["attention_mask"], {"depth": teacher(pixels)})
    loss = output.loss + distiller.total(terms)

Shape suffixes: B = rows, L = sequence, D = width, S = images, N = teacher tokens, E = teacher width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaConfig

from visper.config import Position
from visper.distillation.heads import query_rows
from visper.distillation.layout import TokenLayout
from visper.distillation.objective import EmbeddingDistillation
from visper.distillation.tap import HiddenStateTap, InputTap
from visper.distillation.targets import Targets, gather_targets
from visper.distillation.task import DistilledTask
from visper.model import TaskTokens, random_rows


@dataclass(frozen=True)
class ModelFacts:
    """The facts about a model that distillation needs.

    Attributes:
        decoder: the text model, with a list ``layers``.
        image_token_id: id of the tokens in ``input_ids`` that image features replace.
        width: width of the decoder's hidden states.
        projector: module whose input is the encoder's features, one row per image token; only for target "encoder".
        square_tokens: tokens per image if every image is one square grid; None: grids differ or are unknown, so that
            targets mapped onto image tokens need ``places``.
    """

    decoder: nn.Module
    image_token_id: int
    width: int
    projector: nn.Module | None = None
    square_tokens: int | None = None

    @classmethod
    def of(cls, model: nn.Module) -> ModelFacts:
        """Reads the facts from the model's attributes, by the names that transformers uses.

        Raises:
            ValueError: the model lacks one of them.
        """
        get_decoder = getattr(model, "get_decoder", None)
        config = getattr(model, "config", None)
        decoder = get_decoder() if callable(get_decoder) else None
        image_token_id = getattr(config, "image_token_id", None)
        get_text_config = getattr(config, "get_text_config", None)
        width = getattr(get_text_config() if callable(get_text_config) else None, "hidden_size", None)
        facts = {"get_decoder().layers": getattr(decoder, "layers", None), "config.image_token_id": image_token_id}
        facts["config.get_text_config().hidden_size"] = width
        missing = [name for name, value in facts.items() if value is None]
        if missing:
            raise ValueError(
                f"{type(model).__name__} has no {', no '.join(missing)}: unwrap the model, or pass "
                "facts=ModelFacts(decoder, image_token_id, width)"
            )
        assert isinstance(decoder, nn.Module) and image_token_id is not None and width is not None
        return cls(decoder, int(image_token_id), int(width), square_tokens=_square_tokens(config))


def _square_tokens(config: Any) -> int | None:
    """Tokens per image in models whose images are one square grid: LLaVA and Gemma 3 (without crops)."""
    vision: Any = config.vision_config if isinstance(config, LlavaConfig) else None
    if hasattr(vision, "patch_size"):
        return int((vision.image_size // vision.patch_size) ** 2)
    return getattr(config, "mm_tokens_per_image", None)


def attach(
    model: nn.Module,
    tasks: Mapping[str, DistilledTask],
    facts: ModelFacts | None = None,
    task_token_ids: Mapping[str, list[int]] | None = None,
    init_logit_scale: float = 2.0,
    text_keys: bool = True,
    seed: int = 0,
) -> AttachedDistillation:
    """Builds predictors, queries and losses for ``model``, on its device, to be trained along with it.

    Args:
        model: any vision-language model. It is not modified, except for the hook described at ``task_token_ids``.
        tasks: task name -> task.
        facts: default: ``ModelFacts.of(model)``.
        task_token_ids: task -> vocabulary ids of its task tokens, which the processor must put after each image. A hook
            on the model's input embedding then takes their embeddings from the query matrices; call ``write_back``
            before saving. None: no task tokens. At "task_tokens", a resampler with queries "matrix" then has a query
            matrix that the LLM never sees, and one with queries "states" uses the mean state of the image's tokens.
        init_logit_scale, text_keys: see ``EmbeddingDistillation``.
        seed: seed of the initial queries.

    Raises:
        ValueError: a fact is missing, a layer cannot be tapped, or only some of the tasks have task tokens.
    """
    facts = facts or ModelFacts.of(model)
    layers = len(facts.decoder.layers)  # type: ignore[arg-type]
    ids = {task: list(task_ids) for task, task_ids in (task_token_ids or {}).items()}
    counts = {facts.square_tokens, *map(len, ids.values())} if facts.square_tokens else ()
    objective = EmbeddingDistillation(tasks, facts.width, layers, init_logit_scale, text_keys, counts)
    reads_tokens = [task for task, settings in tasks.items() if settings.at is Position.TASK_TOKENS]
    without = [task for task in reads_tokens if task not in ids and (ids or tasks[task].head.kind != "resampler")]
    if without:
        raise ValueError(
            f"tasks {without} have no task tokens, only {list(ids)} have: give every task its own, or set 'at' to "
            "image_tokens"
        )
    if objective.reads_encoder and facts.projector is None:
        raise ValueError("target 'encoder' is the projector's input: pass facts=ModelFacts(..., projector=...)")
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    generator = torch.Generator().manual_seed(seed)
    rows = {
        task: query_rows(tasks[task].head, tasks[task].target, len(ids.get(task, [0])))
        for task in reads_tokens
        if ids or tasks[task].needs_matrix
    }
    queries = {
        task: random_rows(embedding, count, facts.width, len(ids.get(task, range(count))), generator)
        for task, count in rows.items()
    }
    tokens = TaskTokens({task: ids[task] for task in reads_tokens}, queries) if ids else None
    distiller = AttachedDistillation(facts, objective, tokens, {} if ids else queries)
    distiller.to(embedding.weight.device)
    if tokens is not None:
        tokens.attach(embedding)
    return distiller


class AttachedDistillation(nn.Module):
    """The result of ``attach``. Its parameters are the predictors, the queries and the logit scales, not the model's.

    Attributes:
        objective: the embedding losses.
        task_tokens: the queries, if the model has task tokens; else None.
        queries: task -> query matrix, if the model has no task tokens.
    """

    def __init__(
        self,
        facts: ModelFacts,
        objective: EmbeddingDistillation,
        task_tokens: TaskTokens | None,
        queries: Mapping[str, Tensor],
    ) -> None:
        super().__init__()
        self.objective = objective
        self.task_tokens = task_tokens
        self.queries = nn.ParameterDict({task: nn.Parameter(matrix) for task, matrix in queries.items()})
        self.image_token_id = facts.image_token_id
        self.square_tokens = facts.square_tokens
        # In a partial, so that the model is not registered as a submodule.
        self._tap: Callable[[], HiddenStateTap] = functools.partial(HiddenStateTap, facts.decoder, objective.layers)
        self._tap()  # raises if a layer cannot be tapped
        self._tap_encoder: Callable[[], InputTap] | None = None
        if objective.reads_encoder:
            assert facts.projector is not None
            self._tap_encoder = functools.partial(InputTap, facts.projector)
        self._encoded: list[Tensor] = []

    @contextmanager
    def tap(self) -> Iterator[Mapping[int, Tensor]]:
        """``with distiller.tap() as hidden:`` captures hidden states of the model's forward pass; use them inside."""
        with ExitStack() as taps:
            self._encoded = taps.enter_context(self._tap_encoder()) if self._tap_encoder is not None else []
            yield taps.enter_context(self._tap())

    def forward(
        self,
        hidden: Mapping[int, Tensor],
        input_ids: Tensor,
        attention_mask: Tensor | None,
        targets: Mapping[str, Targets | Tensor],
        image_rows: Tensor | Sequence[int] | None = None,
        num_images: Tensor | int | None = None,
        image_tokens: Tensor | Sequence[int] | None = None,
        samples: Tensor | None = None,
        places: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Computes the unweighted terms: name, such as "depth/20/smooth_l1", -> scalar.

        Args:
            hidden: the states that the tap captured, layer -> ``[B, L, D]``.
            input_ids, attention_mask: ``[B, L]`` as given to the model; the mask may be None.
            targets: task -> the teacher's embeddings ``[S, N, E]`` of the images, in the order of ``image_rows``;
                plain tensors are gathered over all ranks.
            image_rows: ``[S]`` ascending, the row of each image to distill; a row with n images appears n times, and
                rows may be left out. Default: every row with image tokens has one image. Or a list, as image_tokens.
            num_images: divisor of the terms, the number of images in the *global* batch; default: S, which is right in
                one process without gradient accumulation.
            image_tokens, samples, places: see ``TokenLayout.from_ids``. Needed, in this order, for rows with several
                images, for packed rows, and for images whose tokens are not a square grid.

        Raises:
            ValueError: a row has no image or an unexpected number of images, there is not one target per image, the
                states are of other sequences than ``input_ids``, or targets need ``places`` that are not given.
        """
        ids = self.task_tokens.ids if self.task_tokens is not None else {}
        rows, tokens = (
            None if given is None else torch.as_tensor(given, dtype=torch.long, device=input_ids.device)
            for given in (image_rows, image_tokens)
        )
        self._check(hidden, input_ids, rows)
        layout = TokenLayout.from_ids(
            input_ids, attention_mask, self.image_token_id, ids, rows, tokens, samples, places
        )
        self._require_places(layout)
        given = {task: t if isinstance(t, Targets) else gather_targets(t) for task, t in targets.items()}
        if not len(layout.rows) and any(len(target.own) for target in given.values()):
            raise ValueError(
                f"targets are given, but no row of input_ids has an image token (id {self.image_token_id}): pass the "
                "ids given to the model, and targets [0, N, E] for a batch of text"
            )
        queries = dict(self.task_tokens.queries if self.task_tokens is not None else self.queries)
        count = len(layout.rows) if num_images is None else num_images
        encoded = torch.cat([features.flatten(0, -2) for features in self._encoded]) if self._encoded else None
        return self.objective(hidden, self.objective.read(layout), queries, given, count, encoded)

    def total(self, terms: Mapping[str, Tensor], progress: float = 0.0) -> Tensor:
        """The weighted sum of the terms, to be added to the model's own loss; see ``EmbeddingDistillation.total``."""
        return self.objective.total(terms, progress)

    def write_back(self, model: nn.Module) -> None:
        """Writes the trained task tokens into the model's vocabulary, for saving; does nothing without task tokens."""
        if self.task_tokens is not None:
            self.task_tokens.write_back(model.get_input_embeddings())  # type: ignore[operator]

    def _check(self, hidden: Mapping[int, Tensor], input_ids: Tensor, image_rows: Tensor | None) -> None:
        for layer in self.objective.layers:
            if layer not in hidden:
                raise ValueError(
                    f"no states of layer {layer}: run the model, then the distiller, inside `with distiller.tap()`"
                )
            seen = tuple(hidden[layer].shape[:2])
            if seen != tuple(input_ids.shape):
                raise ValueError(
                    f"layer {layer} has states of {seen} rows x positions, input_ids are {tuple(input_ids.shape)}: "
                    "pass the ids given to the model, with one image token for each image feature (as the model's own "
                    "processor makes them)"
                )
        has_image = (input_ids == self.image_token_id).any(1)
        given = [] if image_rows is None else image_rows.tolist()
        without = [row for row in given if not (0 <= row < len(has_image) and has_image[row])]
        if without:
            raise ValueError(
                f"rows {without} have no image token (id {self.image_token_id}): leave them out of image_rows"
            )

    def _require_places(self, layout: TokenLayout) -> None:
        by_place = [name for name, task in self.objective.tasks.items() if task.by_place]
        if layout.places is not None or not by_place:
            return
        counts = set(layout.own_image_tokens().sum(1).tolist()) - {self.square_tokens}
        if counts:
            raise ValueError(
                f"targets of {by_place} are mapped onto image tokens, but the grid of an image of {min(counts)} tokens "
                "is unknown: give 'places', the point of the image that each token shows, set head.kind to resampler, "
                "or, if every image is one square grid, pass facts=ModelFacts(..., square_tokens=...)"
            )
