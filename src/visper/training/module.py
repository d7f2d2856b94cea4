"""The training model: student, task tokens and objective as one module that returns the loss and its named terms.

Everything is normalized by the *global* batch (supervised tokens, samples with an image), so that a term summed over
micro-batches and ranks is the same however the batch is split.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from visper.distillation import EmbeddingDistillation, HiddenStateTap, Targets, TokenLayout
from visper.model import Student, TaskTokens
from visper.training.attention import borders

NTP = "ntp"
"""Name of the next-token term."""
LOGIT_ROWS = 2048
"""Positions whose logits are held at once: 1 GB in float32 with 128k words."""


class TrainingModel(nn.Module):
    """A student that learns.

    Args:
        student: what is trained and later saved.
        task_tokens: their learning (PT) or frozen (VPT, IFT) queries; None for a student without task tokens.
        objective: the embedding losses; None where the stage has none.
    """

    silent: Tensor

    def __init__(
        self, student: Student, task_tokens: TaskTokens | None = None, objective: EmbeddingDistillation | None = None
    ) -> None:
        super().__init__()
        self.student = student.model
        self.processor = student.processor
        self.task_tokens = task_tokens
        self.objective = objective
        self.config = student.model.config  # the engine looks for it
        self.blank_pictures = False
        """For engines that sum gradients in the order they arrive in: batches without images then take the same way."""
        self._ids = (student.image_token_id, dict(student.task_token_ids))
        self.register_buffer("silent", torch.tensor(student.silent_ids), persistent=False)
        if task_tokens is not None:
            task_tokens.attach(self.student.get_input_embeddings())

    def train(self, mode: bool = True) -> TrainingModel:
        """As always, but a frozen encoder stays in evaluation mode: training sees the features that inference sees."""
        super().train(mode)
        vision = self.student.model.vision_tower
        if not any(parameter.requires_grad for parameter in vision.parameters()):
            vision.eval()
        return self

    def recompute_activations(self, share: float = 1.0) -> None:
        """Turns gradient checkpointing on in student and predictors; never re-entrant, which loses hooks' gradients.

        Args:
            share: of the student's layers, evenly spread; the others keep their activations.
        """
        # transformers 5.2x renamed the method; 5.17 has the old name only.
        enable = getattr(self.student, "activation_checkpointing_enable", self.student.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
        layers = [part for part in self.student.modules() if isinstance(part, GradientCheckpointingLayer)]
        for at, layer in enumerate(layers):
            layer.gradient_checkpointing = int((at + 1) * share) > int(at * share)
        # transformers has also made the outputs of all embeddings ask for gradients, which only re-entrant
        # checkpointing needs: a frozen encoder would keep its activations and be walked back through.
        self.student.disable_input_require_grads()
        if self.objective is not None:
            self.objective.recompute = True

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        num_tokens: Tensor | int,
        num_images: Tensor | int = 1,
        pixel_values: Tensor | None = None,
        image_rows: Tensor | None = None,
        targets: Mapping[str, Targets] | None = None,
        position_ids: Tensor | None = None,
        sample_lengths: list[int] | None = None,
    ) -> dict[str, Tensor]:
        """One micro-batch's share of the global loss.

        Args:
            input_ids, attention_mask, labels: ``[B, L]``; labels -100 where unsupervised; padded on the right.
            num_tokens: supervised tokens in the global batch.
            num_images: samples with an image in the global batch.
            pixel_values: ``[B_img, 3, H, W]``.
            image_rows: ``[B_img]`` rows that have an image.
            targets: per task, with an objective.
            position_ids, sample_lengths: of a packed row, ``B = 1`` (``data.packed``).

        Returns:
            ``loss`` and every term by name, each a scalar; unweighted terms, detached.
        """
        layers = self.objective.layers if self.objective is not None else ()
        text_model = self.student.model.language_model
        tap: Any = HiddenStateTap(text_model, layers) if layers else contextlib.nullcontext({})
        blind = pixel_values is None
        with tap as hidden, self._as_if_seen() if blind else contextlib.nullcontext():
            # No mask: padding lies on the right, where causal attention never looks, and a mask would keep SDPA from
            # its causal kernel.
            packed = borders(text_model, position_ids, sample_lengths)
            output = self.student.model(input_ids=input_ids, pixel_values=pixel_values, use_cache=False, **packed)
            ntp = self.next_token_loss(output.last_hidden_state, labels) / num_tokens
            terms = {NTP: ntp}
            loss = ntp
            if self.objective is not None:
                assert self.task_tokens is not None
                image_token_id, task_ids = self._ids
                layout = TokenLayout.from_ids(input_ids, attention_mask, image_token_id, task_ids)
                rows = image_rows if image_rows is not None else input_ids.new_empty(0)
                distilled = self.objective(
                    hidden, layout, dict(self.task_tokens.queries), targets or {}, rows, num_images
                )
                terms.update(distilled)
                loss = loss + self.objective.total(distilled)
        return {"loss": loss, **{name: term.detach() for name, term in terms.items()}}

    @torch.no_grad()
    def predict(
        self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor, image_rows: Tensor
    ) -> dict[str, Tensor]:
        """What the tapped layers predict: ``"depth/20"`` and the like -> ``[B_img, N, E]``. Needs an objective."""
        if self.objective is None or self.task_tokens is None:
            raise ValueError("this model has no objective to predict with: add 'distillation' to the run")
        with HiddenStateTap(self.student.model.language_model, self.objective.layers) as hidden:
            self.student.model(
                input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values, use_cache=False
            )
            layout = TokenLayout.from_ids(input_ids, attention_mask, *self._ids)
            queries = dict(self.task_tokens.queries)
            return {
                f"{task}/{layer}": predicted
                for task in self.objective.tasks
                for layer, predicted in self.objective.predict(task, hidden, layout, queries, image_rows).items()
            }

    def next_token_loss(self, hidden_BLD: Tensor, labels_BL: Tensor) -> Tensor:
        """Cross-entropy summed over supervised positions; logits exist at those positions only, and of ``LOGIT_ROWS``
        of them at a time: with a vocabulary of 128k a batch of long answers would fill a GPU with logits alone.

        Image and task tokens are inputs, never answers: they take no part in the softmax, so that their rows of a tied
        head stay as they are.
        """
        shifted = labels_BL[:, 1:]
        supervised = shifted != -100
        states_TD, wanted_T = hidden_BLD[:, :-1][supervised], shifted[supervised]
        if len(states_TD) <= LOGIT_ROWS:
            return self._cross_entropy(states_TD, wanted_T)
        parts = zip(states_TD.split(LOGIT_ROWS), wanted_T.split(LOGIT_ROWS), strict=True)
        sums = [checkpoint(self._cross_entropy, *part, use_reentrant=False) for part in parts]
        return torch.stack(sums).sum()

    def _cross_entropy(self, states_TD: Tensor, wanted_T: Tensor) -> Tensor:
        logits: Tensor = self.student.get_output_embeddings()(states_TD).float()
        return F.cross_entropy(logits.index_fill_(1, self.silent, float("-inf")), wanted_T, reduction="sum")

    @contextlib.contextmanager
    def _as_if_seen(self) -> Iterator[None]:
        """Makes a batch without images depend on what reads them, to no effect, from where their features would enter.

        DDP waits for every gradient, and FSDP sums a layer's where its input's arrives: on every process, or on none.
        """

        def look(module: nn.Module, args: Any, looked_up_BLD: Tensor) -> Tensor:
            zero = self._blank_picture() if self.blank_pictures else self._untouched()
            return looked_up_BLD + zero.to(looked_up_BLD.dtype)

        handle = self.student.get_input_embeddings().register_forward_hook(look)
        try:
            yield
        finally:
            handle.remove()

    def _blank_picture(self) -> Tensor:
        """Zero that a blank picture went all the way for."""
        inner, size = self.student.model, self.config.vision_config.image_size
        learning = inner.vision_tower.training
        inner.vision_tower.eval()  # batch statistics are of pictures
        pixels = torch.zeros(1, 3, size, size, device=self.silent.device)
        features = torch.cat(list(inner.get_image_features(pixel_values=pixels).pooler_output))
        inner.vision_tower.train(learning)
        return 0.0 * features.sum()

    def _untouched(self) -> Tensor:
        """Zero that depends on the parameters a batch without images does not reach."""
        vision = (self.student.model.vision_tower, self.student.model.multi_modal_projector)
        learning = [p for module in vision for p in module.parameters() if p.requires_grad]
        zero = self.silent.new_zeros((), dtype=torch.float32)
        return zero + sum((0.0 * p.sum().float() for p in learning), start=zero)
