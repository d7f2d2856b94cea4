"""Distillation for any vision-language model of transformers, in your own training loop.

It needs three facts about the model: its decoder layers, the id of its image token, the width of its hidden states.
Image spans are read from the ids, so images may have any size, tiles and separators.

    distiller = attach(model, {"depth": DistilledTask(teacher.spec, layers=(8, 20))})
    with distiller.tap() as hidden:
        output = model(**batch)
        terms = distiller(hidden, batch["input_ids"], batch["attention_mask"], {"depth": teacher(pixels)})
    loss = output.loss + distiller.total(terms)

Shape suffixes: B = rows, L = sequence, D = width, R = rows with an image, N = teacher tokens, E = teacher width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from visper.distillation.heads import query_rows
from visper.distillation.layout import TokenLayout
from visper.distillation.objective import DistilledTask, EmbeddingDistillation
from visper.distillation.tap import HiddenStateTap
from visper.distillation.targets import Targets, gather_targets
from visper.model import TaskTokens, random_rows


@dataclass(frozen=True)
class ModelFacts:
    """What distillation needs to know of a model.

    Attributes:
        decoder: its text model, with a list ``layers``.
        image_token_id: the id whose copies in ``input_ids`` hold the image's features.
        width: of the decoder's hidden states.
    """

    decoder: nn.Module
    image_token_id: int
    width: int

    @classmethod
    def of(cls, model: nn.Module) -> ModelFacts:
        """The facts from the model's own attributes, as transformers names them.

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
                f"{type(model).__name__} has no {', no '.join(missing)}: take a wrapped model out of its wrapper, or "
                "pass facts=ModelFacts(decoder, image_token_id, width)"
            )
        assert isinstance(decoder, nn.Module) and image_token_id is not None and width is not None
        return cls(decoder, int(image_token_id), int(width))


def attach(
    model: nn.Module,
    tasks: Mapping[str, DistilledTask],
    facts: ModelFacts | None = None,
    task_token_ids: Mapping[str, list[int]] | None = None,
    contrastive_weight: float = 0.3,
    init_logit_scale: float = 2.0,
    text_keys: bool = True,
    seed: int = 0,
) -> AttachedDistillation:
    """Predictors, queries and losses for ``model``, on its device, to be trained beside it.

    Args:
        model: any vision-language model; it is not changed, but see ``task_token_ids``.
        tasks: what to distil, by task.
        facts: default: ``ModelFacts.of(model)``.
        task_token_ids: per task the vocabulary ids of its tokens, which the processor must put behind each image.
            Their embeddings then come from the query matrices, through a hook on the model's input embedding; call
            ``write_back`` before saving. None: no task tokens; each predictor with queries "matrix" reads a query
            matrix of its own that the LLM never sees, each with queries "states" the mean state of the image's tokens.
        contrastive_weight, init_logit_scale, text_keys: see ``EmbeddingDistillation``.
        seed: of the queries.

    Raises:
        ValueError: a fact is missing, the model lacks a layer, or a task has no tokens while others have.
    """
    facts = facts or ModelFacts.of(model)
    layers = len(facts.decoder.layers)  # type: ignore[arg-type]
    objective = EmbeddingDistillation(tasks, facts.width, layers, contrastive_weight, init_logit_scale, text_keys)
    ids = {task: list(task_ids) for task, task_ids in (task_token_ids or {}).items()}
    without = [task for task in tasks if ids and task not in ids]
    if without:
        raise ValueError(f"tasks {without} have no task tokens, {list(ids)} have: give all tasks theirs, or none")
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    generator = torch.Generator().manual_seed(seed)
    rows = {
        task: query_rows(settings.predictor, settings.target, len(ids.get(task, [0])))
        for task, settings in tasks.items()
        if ids or settings.queries == "matrix"
    }
    queries = {
        task: random_rows(embedding, count, facts.width, len(ids.get(task, range(count))), generator)
        for task, count in rows.items()
    }
    tokens = TaskTokens({task: ids[task] for task in tasks}, queries) if ids else None
    distiller = AttachedDistillation(facts, objective, tokens, {} if ids else queries)
    distiller.to(embedding.weight.device)
    if tokens is not None:
        tokens.attach(embedding)
    return distiller


class AttachedDistillation(nn.Module):
    """The result of ``attach``. Its parameters are the predictors, the queries and the logit scales, not the model's.

    Attributes:
        objective: the embedding losses.
        task_tokens: the queries of a model with task tokens, else None.
        queries: per task the queries of a model without.
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
        # In a partial, so that the model is not registered as a submodule.
        self._tap: Callable[[], HiddenStateTap] = functools.partial(HiddenStateTap, facts.decoder, objective.layers)

    def tap(self) -> HiddenStateTap:
        """``with distiller.tap() as hidden:`` captures the hidden states of the model's forward; use them inside."""
        return self._tap()

    def forward(
        self,
        hidden: Mapping[int, Tensor],
        input_ids: Tensor,
        attention_mask: Tensor | None,
        targets: Mapping[str, Targets | Tensor],
        image_rows: Tensor | None = None,
        num_images: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """Every term, unweighted, such as "depth/20/smooth_l1" -> scalar.

        Args:
            hidden: what the tap captured, per layer ``[B, L, D]``.
            input_ids, attention_mask: ``[B, L]`` as the model got them; the mask may be None.
            targets: per task the teacher's embeddings ``[R, N, E]`` of the rows in ``image_rows``, in their order;
                plain tensors are gathered over all ranks.
            image_rows: ``[R]`` rows to distil; default: all that hold an image token. One target a row: a row that
                shows several images gets one target for all of them, or is left out here.
            num_images: what the terms are divided by, the rows with an image in the *global* batch; default: R, which
                is right in one process without gradient accumulation.

        Raises:
            ValueError: a row is given twice or shows no image, targets are not one a row, or the decoder saw another
                sequence than ``input_ids``.
        """
        ids = self.task_tokens.ids if self.task_tokens is not None else {}
        layout = TokenLayout.from_ids(input_ids, attention_mask, self.image_token_id, ids)
        has_image = layout.image.any(1)
        if image_rows is None:
            image_rows = has_image.nonzero().flatten()
        self._check(hidden, input_ids, has_image, image_rows)
        given = {task: t if isinstance(t, Targets) else gather_targets(t) for task, t in targets.items()}
        queries = dict(self.task_tokens.queries if self.task_tokens is not None else self.queries)
        count = len(image_rows) if num_images is None else num_images
        return self.objective(hidden, layout, queries, given, image_rows, count)

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of the terms: add it to the model's own loss."""
        return self.objective.total(terms)

    def write_back(self, model: nn.Module) -> None:
        """Writes the trained task tokens into the model's vocabulary, for saving; does nothing without task tokens."""
        if self.task_tokens is not None:
            self.task_tokens.write_back(model.get_input_embeddings())  # type: ignore[operator]

    def _check(self, hidden: Mapping[int, Tensor], input_ids: Tensor, has_image: Tensor, image_rows: Tensor) -> None:
        for layer in self.objective.layers:
            if layer not in hidden:
                raise ValueError(f"no states of layer {layer}: run the model, then this, inside `with distiller.tap()`")
            seen = tuple(hidden[layer].shape[:2])
            if seen != tuple(input_ids.shape):
                raise ValueError(
                    f"layer {layer} saw rows x positions {seen}, input_ids are {tuple(input_ids.shape)}: give the ids "
                    "that the model got, with one image token for each image feature (the model's own processor does)"
                )
        rows = image_rows.tolist()
        if len(set(rows)) != len(rows):
            raise ValueError(
                f"image_rows {rows} name a row twice: a row has one target; leave rows that show several images out, "
                "or give each image a row of its own"
            )
        without = [row for row in rows if not has_image[row]]
        if without:
            raise ValueError(
                f"rows {without} hold no image token (id {self.image_token_id}): leave them out of image_rows"
            )
