"""The training model: student, task tokens and objective in one module that returns the loss and its named terms.

Every term is normalized by the *global* batch (supervised tokens, images), so that its sum over micro-batches and
processes is the same however the batch is split.

Shape suffixes: B = rows, L = tokens of a row, T = supervised tokens, D = width of the LLM.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.hooks import RemovableHandle
from transformers.modeling_layers import GradientCheckpointingLayer

from visper.common.compat import recompute_layers
from visper.config import Position
from visper.data.collator import supervised_places
from visper.data.images import normalized_pixels
from visper.distillation import EmbeddingDistillation, HiddenStateTap, InputTap, Reading, Targets, TokenLayout
from visper.model import AddedWords, Student, TaskTokens
from visper.model.logits import logit_cap
from visper.model.parts import ENCODED, PROJECTOR, VISION, parameters_of
from visper.training.attention import forwarding, own_positions, packing_arguments, padded_arguments
from visper.training.next_token import next_token_loss
from visper.training.positions import Collate, PositioningCollator, image_positions, samples_of
from visper.training.row_attention import FLASH_KEYS
from visper.training.stages import feature_sum

NTP = "ntp"
"""Name of the next-token term."""
TOKEN_LOSSES = "token_losses"
"""Name of the output with the loss of each supervised token; unlike the others, it is not a term."""
IMAGE_KEYS = frozenset(("pixel_values", "model_inputs", "image_rows", "image_tokens", "image_places", "image_at"))
LOSS_KEYS = frozenset(("supervised_at", "readings", "num_tokens", "num_images", "targets", "progress"))
PACKING_KEYS = frozenset(("position_ids", "lengths", "prefixes", "branches", *FLASH_KEYS))
FORWARD_KEYS = {"input_ids", "attention_mask", "labels"} | IMAGE_KEYS | LOSS_KEYS | PACKING_KEYS
"""Keys of a collated batch that ``TrainingModel.forward`` takes."""


class TrainingModel(nn.Module):
    """A student and the modules that are trained with it.

    Args:
        student: the model that is trained and saved.
        task_tokens: query matrices of the task tokens, frozen or trainable; None for a student without task tokens.
        objective: the embedding losses; None in a stage without distillation.
        words: trainable embeddings of added words (PT only); None: the LLM's own embeddings are used.
    """

    silent_ids: Tensor

    def __init__(
        self,
        student: Student,
        task_tokens: TaskTokens | None = None,
        objective: EmbeddingDistillation | None = None,
        words: AddedWords | None = None,
    ) -> None:
        super().__init__()
        self.student = student.model
        self.processor = student.processor
        self.task_tokens = task_tokens
        self.words = words
        self.objective = objective
        self.config = student.model.config  # transformers' Trainer reads it
        self.encode_blank_image = False
        """Whether text-only batches run a blank image through the encoder, see ``deepspeed.prepare_for_zero``."""
        self.image_token_id = student.image_token_id
        self.task_token_ids = dict(student.task_token_ids)
        self._blank_image = functools.cache(student.blank_image)
        self.logit_cap = None if student.is_llava else logit_cap(student.model)
        self.register_buffer("silent_ids", torch.tensor(student.silent_ids, dtype=torch.long), persistent=False)
        self._replacing: list[RemovableHandle] = []
        if task_tokens is not None:
            self._replacing.append(task_tokens.attach(self.student.get_input_embeddings()))
        self.register_load_state_dict_post_hook(_allow_missing_frozen)
        if words is not None:
            self._replacing += words.attach(self.student.get_input_embeddings(), self.student.get_output_embeddings())

    def read_vocabulary(self) -> None:
        """Removes the hooks, so that task tokens and added words are looked up in the vocabulary, as after training."""
        while self._replacing:
            self._replacing.pop().remove()

    @property
    def trains_task_tokens(self) -> bool:
        """Whether a task reads the task tokens; their queries are then trained in any stage."""
        tasks = () if self.objective is None else self.objective.tasks.values()
        return any(task.at is Position.TASK_TOKENS for task in tasks)

    def frozen_heads(self) -> list[str]:
        """Parameter names of frozen heads, which keep their initial weights."""
        if self.objective is None:
            return []
        frozen = tuple(
            f"objective.predictors.{head}."
            for name, task in self.objective.tasks.items()
            if task.head.frozen
            for head in task.head_names(name)
        )
        return [name for name, _ in self.named_parameters() if name.startswith(frozen)]

    def train(self, mode: bool = True) -> TrainingModel:
        """Sets training mode, except for a frozen encoder, so that its features are those of inference."""
        super().train(mode)
        if not any(parameter.requires_grad for _, parameter in parameters_of(self.student, VISION)):
            self.student.get_encoder(modality="image").eval()
        return self

    def recompute_activations(self, share: float = 1.0) -> None:
        """Turns on gradient checkpointing in student and predictors.

        Args:
            share: fraction of the student's layers to recompute, evenly spread; the others keep their activations.
        """
        recompute_layers(self.student)
        layers = [part for part in self.student.modules() if isinstance(part, GradientCheckpointingLayer)]
        for at, layer in enumerate(layers):
            layer.gradient_checkpointing = int((at + 1) * share) > int(at * share)
        if self.objective is not None:
            self.objective.recompute = share > 0

    def with_positions(self, collator: Collate) -> PositioningCollator:
        """A collator whose batches contain the positions that ``forward`` would otherwise compute on the device."""
        ids = (self.image_token_id, self.task_token_ids)
        if self.objective is None:
            return PositioningCollator(collator, *ids)
        return PositioningCollator(collator, *ids, self.objective.tasks, self.objective.text_keys)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        num_tokens: Tensor | int,
        num_images: Tensor | int = 1,
        pixel_values: Tensor | None = None,
        model_inputs: Mapping[str, Tensor] | None = None,
        image_rows: Tensor | None = None,
        image_tokens: Tensor | None = None,
        image_places: Tensor | None = None,
        targets: Mapping[str, Targets] | None = None,
        progress: float = 0.0,
        position_ids: Tensor | None = None,
        supervised_at: Tensor | None = None,
        image_at: Tensor | None = None,
        readings: Mapping[str, Reading] | None = None,
        token_losses: bool = False,
        **borders: Any,
    ) -> dict[str, Tensor]:
        """Computes one micro-batch's share of the global loss.

        Args:
            input_ids, attention_mask, labels: ``[B, L]``; labels -100 where unsupervised; padded on the right.
            num_tokens, num_images: supervised tokens and images in the global batch.
            pixel_values: ``[S, 3, H, W]``, for a LLaVA; uint8 is normalized as by its image processor.
            model_inputs: for other models, all inputs except ids and mask, by the model's own names (``data.vlm``).
            image_rows, image_tokens, image_places: row and tokens of each image, see ``data.collator.Batch``.
            targets: targets by task; needed with an objective.
            progress: fraction of the steps that are done.
            position_ids: ``[1, L]`` of a packed row (``data.packing``).
            supervised_at, image_at, readings: see ``data.collator.Batch``; None: computed here, waiting for a GPU.
            token_losses: also return ``TOKEN_LOSSES``, ``[T]``.
            **borders: the other entries of a packed batch, see ``attention.packing_arguments``.

        Returns:
            ``loss`` and every term by name, all scalars; the terms are unweighted and detached.
        """
        if readings is None:
            of_images = (image_rows, image_tokens, samples_of(position_ids), image_places)
            readings = {} if image_rows is None else self._read(input_ids, attention_mask, *of_images)
        separated = self._separated(input_ids, position_ids, model_inputs, borders)
        with separated, self._tap() as (hidden, encoded), self._reaching_vision(pixel_values, model_inputs):
            inputs = {"input_ids": input_ids, **(model_inputs or {})}
            if model_inputs is None:
                inputs = self._embedded(input_ids, self._normalized(pixel_values), image_at)
            elif position_ids is None:
                inputs["attention_mask"] = attention_mask
            output = self.student.model(use_cache=False, **inputs)
            losses = self.next_token_loss(output.last_hidden_state, labels, supervised_at, each=token_losses)
            loss = losses.sum() / num_tokens
            terms = {NTP: loss}
            if self.objective is not None:
                features = self._features(encoded)
                distilled = self.objective(hidden, readings, self._queries(), targets or {}, num_images, features)
                loss = loss + self.objective.total(distilled, progress)
                terms |= distilled
        terms = {name: term.detach() for name, term in terms.items()}
        return {"loss": loss, **terms, **({TOKEN_LOSSES: losses.detach()} if token_losses else {})}

    def _separated(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        model_inputs: Mapping[str, Tensor] | None,
        borders: Mapping[str, Any],
    ) -> AbstractContextManager[None]:
        """Passes the LLM the arguments that separate samples from each other and from padding.

        Padded rows of a LLaVA get no mask: causal attention never reads padding on the right, and a mask would prevent
        SDPA's causal kernel. Other models may derive positions from the mask, or attend in both directions.
        """
        llm = self.student.get_decoder()
        if position_ids is None:
            return forwarding(llm, padded_arguments(llm, input_ids) if model_inputs is None else {})
        if model_inputs is not None:
            position_ids = own_positions(self.student.model, input_ids, position_ids, borders, model_inputs)
        return forwarding(llm, packing_arguments(llm, position_ids, borders))

    def _embedded(self, input_ids: Tensor, pixels: Tensor | None, image_at: Tensor | None) -> dict[str, Tensor]:
        """The input embeddings of a LLaVA, with image features at the image tokens.

        LLaVA's own forward also counts image tokens on the GPU, for a check and again in the backward pass.
        """
        embedded_BLD = self.student.get_input_embeddings()(input_ids)
        if pixels is None:  # embedded here too, because ZeRO-3 needs the same order of modules on every process
            return {"inputs_embeds": embedded_BLD}
        features = self.student.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
        features_TD = torch.cat(list(features)).to(embedded_BLD.dtype)
        at_T = image_positions(input_ids, self.image_token_id) if image_at is None else image_at
        if len(at_T) != len(features_TD):
            raise ValueError(
                f"the batch has {len(at_T)} image tokens (id {self.image_token_id}), but its images give "
                f"{len(features_TD)} features: use ids and pixels of one processor, and do not truncate image tokens"
            )
        return {"inputs_embeds": embedded_BLD.flatten(0, 1).index_copy(0, at_T, features_TD).view_as(embedded_BLD)}

    def generate(self, **inputs: Any) -> Tensor:
        """The student's ``generate``; under FSDP, only this method gathers the weights outside the decoder layers."""
        return cast("Tensor", self.student.generate(**inputs))

    def _normalized(self, pixels: Tensor | None) -> Tensor | None:
        """uint8 pixels, normalized and cast to the encoder's precision; FSDP and DeepSpeed cast float inputs only."""
        if pixels is None or pixels.dtype != torch.uint8:
            return pixels
        weight = next(parameter for _, parameter in parameters_of(self.student, VISION))
        return normalized_pixels(self.processor.image_processor, pixels).to(weight.dtype)

    @torch.no_grad()
    def predict(self, inputs: Mapping[str, Tensor], *of_images: Tensor | None) -> dict[str, Tensor]:
        """The tapped layers' predictions by name, such as ``"depth/20"``, each ``[S, N, E]``.

        Args:
            inputs: the inputs of the student's forward, ids and mask included.
            of_images: rows, tokens and places of the images, see ``TokenLayout.from_ids``.

        Raises:
            ValueError: the model has no objective.
        """
        if self.objective is None:
            raise ValueError("this model has no objective, so it predicts nothing: add 'distillation' to the run")
        with self._tap() as (hidden, _):
            self.student.model(**inputs, use_cache=False)
            layout = self._layout(inputs["input_ids"], inputs["attention_mask"], *of_images)
            return {
                f"{task}/{layer}": predicted
                for task in self.objective.tasks
                for layer, predicted in self.objective.predict(task, hidden, layout, self._queries()).items()
            }

    def next_token_loss(
        self, hidden_BLD: Tensor, labels_BL: Tensor, supervised_at_T: Tensor | None = None, each: bool = False
    ) -> Tensor:
        """Cross-entropy summed over supervised tokens; with ``each``, per token, ``[T]``."""
        at_T = supervised_places(labels_BL) if supervised_at_T is None else supervised_at_T
        return next_token_loss(
            hidden_BLD.flatten(0, 1)[at_T],
            labels_BL.flatten()[at_T + 1],
            self.student.get_output_embeddings(),
            self.silent_ids,
            self.logit_cap,
            fuse=self.words is None and not isinstance(self, FSDPModule),  # added words are scored by a hook
            each=each,
        )

    @contextlib.contextmanager
    def _tap(self) -> Iterator[tuple[Mapping[int, Tensor], list[Tensor]]]:
        """Captures the objective's inputs: hidden states by layer, and the projector's input in each of its calls."""
        with contextlib.ExitStack() as taps:
            hidden: Mapping[int, Tensor] = {}
            encoded: list[Tensor] = []
            if self.objective is not None and self.objective.layers:
                hidden = taps.enter_context(HiddenStateTap(self.student.get_decoder(), self.objective.layers))
            if self.objective is not None and self.objective.reads_encoder:
                kept = ENCODED[self.student.config.model_type]
                encoded = taps.enter_context(InputTap(self.student.get_submodule(kept.module)))
            yield hidden, encoded

    def _features(self, encoded: Sequence[Tensor]) -> Tensor | None:
        """Encoder features ``[image tokens, width]``; None if no task uses them as target."""
        if not encoded or self.objective is None:
            return None
        width = next(task.target.width for task in self.objective.tasks.values() if task.own == "encoder")
        return torch.cat([values.reshape(-1, width) for values in encoded])

    def _layout(self, input_ids: Tensor, attention_mask: Tensor, *of_images: Tensor | None) -> TokenLayout:
        """``of_images``: the arguments of ``TokenLayout.from_ids`` after the task tokens."""
        return TokenLayout.from_ids(input_ids, attention_mask, self.image_token_id, self.task_token_ids, *of_images)

    def _read(self, *of_batch: Any) -> dict[str, Reading]:
        """The ``Reading`` of each task; same arguments as ``_layout``."""
        return {} if self.objective is None else self.objective.read(self._layout(*of_batch))

    def _queries(self) -> dict[str, Tensor]:
        return {} if self.task_tokens is None else dict(self.task_tokens.queries)

    def blank_image(self) -> dict[str, Tensor]:
        """The student's inputs for an image of one color, on its device and in its precision."""
        dtype, device = self.student.dtype, self.student.device
        blank = self._blank_image().items()
        return {name: value.to(device, dtype if value.is_floating_point() else None) for name, value in blank}

    @contextlib.contextmanager
    def _reaching_vision(self, pixels: Tensor | None, model_inputs: Mapping[str, Tensor] | None) -> Iterator[None]:
        """Adds a zero-valued dependency on the vision parameters to the embeddings of a text-only batch.

        Such a batch then yields zero gradients for them. Otherwise DDP would wait forever for the missing gradients,
        and FSDP and DeepSpeed for a process that skips a module which the others run.
        """
        if pixels is not None or "pixel_values" in (model_inputs or {}):
            yield
            return

        def add_zero(module: nn.Module, args: Any, embedded_BLD: Tensor) -> Tensor:
            zero = self._zero_from_blank_image() if self.encode_blank_image else self._zero_from_parameters()
            return embedded_BLD + zero.to(embedded_BLD.dtype)

        handle = self.student.get_input_embeddings().register_forward_hook(add_zero)
        try:
            yield
        finally:
            handle.remove()

    def _zero_from_blank_image(self) -> Tensor:
        """A zero that depends on the vision parameters through a forward pass of a blank image."""
        vision = self.student.get_encoder(modality="image")
        training = vision.training
        vision.eval()  # the blank image must not change batch statistics
        features = feature_sum(self.student, self.blank_image())
        vision.train(training)
        return 0.0 * features

    def _zero_from_parameters(self) -> Tensor:
        """A zero that depends on the trainable vision parameters directly."""
        parts = (parameters_of(self.student, part) for part in (VISION, PROJECTOR))
        trainable = [parameter for part in parts for _, parameter in part if parameter.requires_grad]
        zero = self.silent_ids.new_zeros((), dtype=torch.float32)
        return sum((0.0 * p.sum().float() for p in trainable), start=zero)


def _allow_missing_frozen(model: nn.Module, found: Any) -> None:
    """Lets a state dict without frozen parameters load: checkpoints omit them, because they never change."""
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    found.missing_keys[:] = [name for name in found.missing_keys if name not in frozen]
