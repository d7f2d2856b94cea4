"""OneFormer as teacher (arXiv 2211.06220): the last feature map of its backbone, drawn by its two decoders."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoTokenizer, OneFormerImageProcessor, OneFormerModel

from visper.distillation.teachers.base import TargetSpec, Teacher
from visper.distillation.teachers.pretrained import divided, load_complete, squashed_as_trained
from visper.distillation.teachers.segment_maps import Segmentation, segment_images
from visper.model.hub import sizes_of

DRAWN_SIZE = (384, 384)
"""Height and width of drawn images: half of 768, with names still legible."""

WORDS = 4
"""Number of words in "the task is panoptic": a working tokenizer gives at least as many different ids."""


class OneFormerTeacher(Teacher):
    """Target: the backbone's last stage (768 px, Swin-L: 24 x 24 tokens x 1536).

    Args:
        model: hub id or folder of a ``OneFormerForUniversalSegmentation``.
        size: side of the image in pixels, a multiple of the last stage's stride.
        draw: what ``decode`` draws. Needs the model's tokenizer, as OneFormer reads its task as text.
        revision: commit, tag or branch of a hub id; default: its main branch.
    """

    def __init__(
        self,
        model: str | Path,
        size: int = 768,
        draw: Literal["panoptic", "semantic"] = "panoptic",
        revision: str | None = None,
    ) -> None:
        super().__init__()
        if draw not in ("panoptic", "semantic"):
            raise ValueError(f"'draw' is {draw!r}: set it to panoptic or semantic")
        # Not OneFormerForUniversalSegmentation, whose loss needs scipy; its outputs are all available here. The text
        # branch is for training only.
        self.model = load_complete(OneFormerModel, model, is_training=False, revision=revision)
        self.spec = _spec(self.model.config, size)
        self.preprocess = squashed_as_trained(model, (size, size), revision=revision)
        self.draw, self.place, self.revision = draw, str(model), revision
        self.freeze()

    @classmethod
    def planned_spec(cls, model: str | Path, size: int = 768, **options: Any) -> TargetSpec:
        """Read from the configuration alone."""
        return _spec(sizes_of(str(model), "oneformer teacher", revision=options.get("revision")), size)

    def encode(self, pixels: Tensor) -> Tensor:
        """``[B, rows * columns, channels]``, row by row."""
        last: Tensor = self.model.pixel_level_module.encoder(pixels).feature_maps[-1]
        return last.flatten(2).transpose(1, 2)

    def decode(self, embedding: Tensor, pixels: Tensor | None = None, reference: Tensor | None = None) -> Tensor:
        """Segments in their classes' colors, with names, ``[B, 3, 384, 384]``; components if ``pixels`` is None.

        Beside the embedding, the decoders read three finer levels of the backbone, which are computed from ``pixels``.
        """
        if pixels is None:
            return super().decode(embedding, reference=reference)
        return segment_images(self.segment(embedding, pixels, self.draw), borders=self.draw == "panoptic")

    @torch.no_grad()
    def segment(self, embedding: Tensor, pixels: Tensor, task: str = "panoptic") -> list[Segmentation]:
        """The decoders' segmentation, with ``embedding`` in place of the backbone's last level.

        Args:
            embedding: ``[B, rows * columns, channels]``, the teacher's or predicted.
            pixels: the same images, preprocessed.
            task: "panoptic" (each object by itself) or "semantic" (a class for every pixel).
        """
        output = self._decoded(embedding, pixels, task)
        logits = SimpleNamespace(
            class_queries_logits=output.transformer_decoder_class_predictions.float(),
            masks_queries_logits=output.transformer_decoder_mask_predictions.float(),
        )
        processor, sizes = OneFormerImageProcessor(), [DRAWN_SIZE] * len(pixels)
        names = {int(index): str(name) for index, name in self.model.config.id2label.items()}
        if task == "semantic":
            maps = processor.post_process_semantic_segmentation(logits, target_sizes=sizes)
            return [_semantic(classes, names) for classes in maps]
        # No checkpoint says which classes are "stuff" to be fused: pieces of sky stay separate.
        found = processor.post_process_panoptic_segmentation(logits, label_ids_to_fuse=set(), target_sizes=sizes)
        return [_panoptic(one["segmentation"], one["segments_info"], names) for one in found]

    def _decoded(self, embedding: Tensor, pixels: Tensor, task: str) -> Any:
        weight = next(self.model.parameters())
        assert self.spec.grid is not None
        last = embedding.to(weight.device, weight.dtype).transpose(1, 2).unflatten(2, self.spec.grid)

        def replace(module: Any, args: Any, output: Any) -> Any:
            output.feature_maps = (*output.feature_maps[:-1], last)
            return output

        handle = self.model.pixel_level_module.encoder.register_forward_hook(replace)
        try:
            words = self._task_words(task).expand(len(pixels), -1)
            return self.model(pixels.to(weight.device, weight.dtype), words.to(weight.device))
        finally:
            handle.remove()

    def _task_words(self, task: str) -> Tensor:
        """Token ids of the task ``[1, length]``, 0 at padding, as the model was trained."""
        fault = ValueError(
            f"no tokenizer at '{self.place}': OneFormer's decoder reads its task as text; save the tokenizer beside "
            "the weights"
        )
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.place, revision=self.revision)
        except (OSError, ValueError) as error:
            raise fault from error
        length = self.model.config.task_seq_len
        words = tokenizer(
            [f"the task is {task}"], padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        ids: Tensor = words.input_ids * words.attention_mask
        # Without tokenizer files transformers creates a tokenizer that maps every word to the unknown token.
        if len(words.input_ids[words.attention_mask.bool()].unique()) < WORDS:
            raise fault
        return ids


def _semantic(classes: Tensor, names: dict[int, str]) -> Segmentation:
    present = [int(index) for index in classes.unique()]
    return Segmentation(classes.long() + 1, {index + 1: index for index in present}, _known(present, names))


def _panoptic(segments: Tensor, info: Sequence[dict[str, Any]], names: dict[int, str]) -> Segmentation:
    classes = {int(one["id"]): int(one["label_id"]) for one in info}
    # transformers returns -1 everywhere if it finds no segment.
    return Segmentation(segments.long().clamp(min=0), classes, _known(list(classes.values()), names))


def _known(classes: Sequence[int], names: dict[int, str]) -> dict[int, str]:
    return {index: names.get(index, f"class {index}") for index in classes}


def _spec(config: Any, size: int) -> TargetSpec:
    side = divided(size, max(config.strides), "oneformer")
    return TargetSpec(side * side, int(config.backbone_config.hidden_size), (side, side))
