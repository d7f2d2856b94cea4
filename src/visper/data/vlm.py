"""Encoding for image-text-to-text models with their own processor, which makes the image tokens and the tensors.

The number of tokens of an image depends on its size, so a row is encoded with the sizes of its images. Counts made
without them (the check of every row, grouping by length) assume ``NOMINAL_SIZE`` for every image.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import LlavaProcessor

from visper.common.errors import ConfigError, DataError
from visper.data.chat import IGNORED, ConversationEncoder
from visper.data.chat_template import SENTINEL
from visper.data.image_places import Shown, places_of
from visper.data.images import geometry_of
from visper.data.rows.records import Record

NOMINAL_SIZE = (640, 480)
"""Assumed width and height of an image that has not been opened."""
CACHED_ROWS = 4096
_BETWEEN = SENTINEL.format(0)
"""Separates the images of a row in ``image_blocks``."""


def encoder_for(processor: Any, max_tokens: int = sys.maxsize) -> ConversationEncoder:
    """The encoder for a student with this processor."""
    kind = ConversationEncoder if isinstance(processor, LlavaProcessor) else VlmEncoder
    return kind(processor, max_tokens)


def seen_geometry(processor: Any) -> str:
    """The geometry in which teachers see an image: the LLaVA processor's; "squash" for a model's own processor."""
    return geometry_of(processor.image_processor) if isinstance(processor, LlavaProcessor) else "squash"


class VlmEncoder(ConversationEncoder):
    """Encodes records with a model's own processor and chat template, and supervises the answers.

    Raises:
        ConfigError: the processor has no chat template or no image token, or writes images as a text from which its
            tokenizer makes other tokens.
    """

    of_any_size = False

    def _read_image_tokens(self) -> tuple[int, int]:
        """The id of the token that image features replace, and its number for an image of ``NOMINAL_SIZE``."""
        if not getattr(self.processor, "chat_template", None) or not getattr(self.processor, "image_token", None):
            raise ConfigError(
                f"{type(self.processor).__name__} of '{self.tokenizer.name_or_path}' has no chat template or no image "
                "token: use the instruct version of the model"
            )
        self._cache_blocks()
        try:
            text = self.image_text
        except DataError as error:  # a size that no model rejects: it rejects the call (GOT-OCR2, Qianfan-OCR)
            raise ConfigError(
                f"{type(self.processor).__name__} does not accept a row of text and images in the common way of "
                f"transformers: this model is not supported ({error.__cause__})"
            ) from error
        found = Counter(token for token in self._ids(text) if token in self._special_ids).most_common(1)
        if not found:
            raise ConfigError(
                f"the tokenizer '{self.tokenizer.name_or_path}' has no special token for image features: this model "
                "is not supported"
            )
        return found[0]

    @property
    def image_text(self) -> str:
        """The text that replaces an image of ``NOMINAL_SIZE``."""
        return self._blocks((NOMINAL_SIZE,))[0]

    def __getstate__(self) -> dict[str, Any]:
        """The state without the cache, which cannot be pickled."""
        return {name: value for name, value in self.__dict__.items() if name != "_blocks"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._cache_blocks()

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _cache_blocks(self) -> None:
        self._blocks = lru_cache(CACHED_ROWS)(partial(image_blocks, self.processor))

    def _tokens(
        self, record: Record, asks: bool, sizes: Sequence[tuple[int, int]] | None = None
    ) -> tuple[list[int], list[int], list[tuple[int, int]]]:
        sizes = (NOMINAL_SIZE,) * len(record.images) if sizes is None else tuple(sizes)
        blocks = self._blocks(sizes) if sizes else []
        ids, labels, _ = self._label(self._fill(record, asks, blocks))
        return ids, labels, self._spans(ids, labels, blocks)

    def _spans(self, ids: list[int], labels: list[int], blocks: Sequence[str]) -> list[tuple[int, int]]:
        """The span of each image, from its first token to its last, including the special tokens on both sides."""
        counts = [block.count(self._image_text) for block in blocks]
        tails = [len(self._ids(block.rpartition(self._image_text)[2])) for block in blocks]
        places = [at for at, token in enumerate(ids) if token == self.image_token_id]
        if len(places) != sum(counts):
            raise DataError("image tokens", f"the row has {len(places)} image tokens: expected {sum(counts)}")
        spans: list[tuple[int, int]] = []
        for count, tail in zip(counts, tails, strict=True):
            own, places = places[:count], places[count:]
            start, end = own[0], own[-1] + 1
            while start > (spans[-1][1] if spans else 0) and ids[start - 1] in self._behind_image:
                start -= 1
            while end < len(ids) and ids[end] in self._behind_image and labels[end] == IGNORED:
                end += 1
            last = min(own[-1] + 1 + tail + len(self._tail), len(ids))
            behind = [at for at in range(end, last) if ids[at] in self._behind_image and ids[at] in self._tail]
            spans.append((start, behind[-1] + 1 if behind else end))
        return spans

    @cached_property
    def _tail(self) -> list[int]:
        """The tokens that the template writes between an image and the text after it, including task tokens."""
        content = [{"type": "image"}, {"type": "text", "text": SENTINEL.format(0)}]
        shown = self.processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        return self._ids(shown.split(SENTINEL.format(0))[0].rpartition(self.processor.image_token)[2])

    @cached_property
    def _image_text(self) -> str:
        """The text of the token that image features replace."""
        return str(self.tokenizer.convert_ids_to_tokens(self.image_token_id))


def image_blocks(processor: Any, sizes: Sequence[tuple[int, int]]) -> list[str]:
    """The texts that replace a row's images of the given widths and heights.

    Raises:
        DataError: the processor rejects images of these sizes.
        ConfigError: the tokenizer makes other tokens from these texts.
    """
    tokenizer = processor.tokenizer
    blank = [[Image.new("RGB", size) for size in sizes]]
    asked = _BETWEEN.join([processor.image_token] * len(sizes))
    try:
        with torch.device("cpu"):  # the caller may be building a model on the meta device
            made = processor(text=[asked], images=blank, add_special_tokens=False)
    except ValueError as error:
        shown = ", ".join(f"{width} x {height}" for width, height in sizes)
        raise DataError("image size", f"{shown} pixels: the model's processor: {error}") from error
    ids = [int(token) for token in made["input_ids"][0]]
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    blocks: list[str] = text.split(_BETWEEN)
    if list(tokenizer(text, add_special_tokens=False)["input_ids"]) != ids or len(blocks) != len(sizes):
        raise ConfigError(
            f"{type(processor).__name__} of '{tokenizer.name_or_path}' makes image tokens that its tokenizer does not "
            f"make from their text {text[:60]!r}: this model is not supported"
        )
    return blocks


class ModelInputs:
    """Makes a model's inputs besides ids and mask, for a micro-batch, with the model's own processor; picklable.

    Raises:
        ConfigError: the processor also makes tensors from the text, such as the masks of cross-attention (Mllama).
    """

    def __init__(self, processor: Any, image_token_id: int) -> None:
        self.processor = processor
        self.image_token_id = image_token_id
        self._types = self._token_types()

    def __call__(self, input_ids: Tensor, images: Sequence[Sequence[Image.Image]]) -> dict[str, Tensor]:
        """Keyword arguments of the model's forward, for ids ``[B, L]`` and the images of each row that has any."""
        return (self.images(images) if images else {}) | self.token_types(input_ids)

    def token_types(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Masks of the image tokens, shaped like ``input_ids``, under the names that the model's forward uses."""
        return dict.fromkeys(self._types, (input_ids == self.image_token_id).long())

    def places(
        self, images: Sequence[Sequence[Image.Image]], counts: Sequence[int], made: Mapping[str, Tensor]
    ) -> Tensor | None:
        """The point that each image token shows, ``[image tokens, 2]``, see ``collator.Batch``; None if unknown.

        Args:
            counts: the tokens of each image.
            made: the result of ``__call__`` for these images.
        """
        grids = made.get("image_grid_thw", [None] * len(counts))
        alone = [len(row) == 1 for row in images for _ in row]
        pairs = zip((image.size for row in images for image in row), counts, alone, grids, strict=True)
        found = [places_of(self.processor, Shown(*of_image)) for of_image in pairs]
        known = [places for places in found if places is not None]
        return torch.cat(known) if known and len(known) == len(found) else None

    def images(self, images: Sequence[Sequence[Image.Image]]) -> dict[str, Tensor]:
        """The tensors that depend only on the images."""
        return {name: value for name, value in self._made(images).items() if not _is_of_tokens(name)}

    def _made(self, images: Sequence[Sequence[Image.Image]], behind: str = "") -> dict[str, Tensor]:
        texts = [self.processor.image_token * len(shown) + behind for shown in images]
        shown = [list(row) for row in images]
        made = self.processor(text=texts, images=shown, return_tensors="pt", padding=True)
        return {name: torch.as_tensor(value) for name, value in made.items()}

    def _token_types(self) -> list[str]:
        """The names under which the model's forward takes masks of the image tokens."""
        blank = [[Image.new("RGB", NOMINAL_SIZE)]]
        made, longer = self._made(blank), self._made(blank, behind=SENTINEL.format(0))
        of_text = [name for name in made if not _is_of_tokens(name) and made[name].shape != longer[name].shape]
        if of_text:
            raise ConfigError(
                f"{type(self.processor).__name__} makes '{of_text[0]}' from the text of a row, not only from its "
                "images: this model is not supported"
            )
        is_image = made["input_ids"] == self.image_token_id
        return [name for name, value in made.items() if "type_ids" in name and torch.equal(value == 1, is_image)]


def _is_of_tokens(name: str) -> bool:
    return name in ("input_ids", "attention_mask") or "type_ids" in name
