"""Wraps another trainer's collator and adds the teachers' inputs to its batches; picklable, for loader workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import LlavaProcessor

from visper.data.checks.digests import image_id
from visper.data.collator import Preprocess
from visper.data.images import arrange, background_of, places_seen, rgb_bytes, stacked
from visper.data.vlm import ModelInputs, image_blocks, seen_geometry

SHARE = "distillation"
"""Batch key of the added entries."""


class TeacherCollator:
    """Adds ``batch[SHARE]``: "image_rows" and "image_tokens" ``[S]``, "teacher_images" per task ``[S, ...]``, "places".

    If the student sees images cropped or padded to a square (LLaVA), so do the teachers.

    Args:
        collator: creates the model's batch.
        by_place: whether a task needs the position of each token in the image, see ``TokenLayout.places``.
    """

    def __init__(
        self,
        collator: Callable[[list[Any]], Any],
        preprocess: Mapping[str, Preprocess],
        processor: Any,
        image_token_id: int,
        by_place: bool = False,
    ) -> None:
        self.collator = collator
        self.preprocess = dict(preprocess)
        self.processor = processor
        self.image_token_id = image_token_id
        self._geometry = seen_geometry(processor)
        own = by_place and not isinstance(processor, LlavaProcessor)
        self._inputs = ModelInputs(processor, image_token_id) if own else None

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        """The collator's batch with ``batch[SHARE]`` added.

        Raises:
            ValueError: rows have no image column, images are not PIL images, or a row's images do not match its text.
        """
        shown = [_images_of(example) for example in examples]  # before the collator, which may change its examples
        batch = self.collator(examples)
        counts = (batch["input_ids"] == self.image_token_id).sum(1).tolist()
        tokens = [
            self._tokens(row, images, count) for row, (images, count) in enumerate(zip(shown, counts, strict=True))
        ]
        flat = [image for images in shown for image in images]
        background = background_of(self.processor.image_processor)
        seen = [rgb_bytes(arrange(image, self._geometry, background)) for image in flat]
        batch[SHARE] = {
            "image_rows": torch.tensor([row for row, images in enumerate(shown) for _ in images], dtype=torch.long),
            "image_tokens": torch.tensor([count for of_row in tokens for count in of_row], dtype=torch.long),
            "image_ids": torch.tensor([image_id(image.tobytes()) for image in flat], dtype=torch.long),
            "teacher_images": {
                task: stacked([preprocess(image) for image in seen]) if seen else torch.empty(0)
                for task, preprocess in self.preprocess.items()
            },
            "places": self._places(shown, [count for of_row in tokens for count in of_row], batch) if flat else None,
        }
        return batch

    def _places(self, shown: Sequence[Sequence[Image.Image]], counts: Sequence[int], batch: Any) -> Tensor | None:
        """The part of its image that each token shows; None for a square grid over the image, or if not needed."""
        if self._inputs is not None:
            return self._inputs.places([images for images in shown if images], counts, batch)
        return places_seen(self._geometry, [image.size for images in shown for image in images], counts)

    def _tokens(self, row: int, images: Sequence[Image.Image], count: int) -> list[int]:
        """The number of image tokens of each image of a row, ``count`` in total."""
        if len(images) > 1:
            token = self.processor.tokenizer.convert_ids_to_tokens(self.image_token_id)
            found = [block.count(token) for block in image_blocks(self.processor, [image.size for image in images])]
        else:
            found = [count] * len(images)
        if sum(found) != count or not all(found):
            raise ValueError(
                f"row {row} of the batch has {len(images)} images in its column, but its text has {count} image tokens "
                f"(id {self.image_token_id}), expected {sum(found) or 'some'}: list every image of the text, and set a "
                "max_length that does not cut it"
            )
        return found


def _images_of(example: Mapping[str, Any]) -> list[Image.Image]:
    if "images" not in example and "image" not in example:
        raise ValueError(
            f"distillation needs rows with a column 'images' or 'image', found {sorted(example)}: add it, and set "
            "remove_unused_columns=False if the trainer drops it"
        )
    images = example["images"] if "images" in example else example["image"]
    listed = [] if images is None else list(images) if isinstance(images, list | tuple) else [images]
    for image in listed:
        if not isinstance(image, Image.Image):
            raise ValueError(f"an image of a row is a {type(image).__name__}, but teachers need PIL images: decode it")
    return listed
