"""A student's greedy answers to questions with images."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature

from visper.common.gpus import avoid_plans_by_shape
from visper.data.decoding import to_rgb
from visper.data.images import student_pixels
from visper.data.rows.formats import parse_row
from visper.data.rows.records import Record
from visper.data.vlm import ModelInputs, VlmEncoder, encoder_for
from visper.model import Student, load_student

logger = logging.getLogger(__name__)

GREEDY: dict[str, Any] = {"do_sample": False, "num_beams": 1}
"""Greedy decoding, also of a model whose own generation settings are sampling or beams."""


def as_row(question: str, images: Sequence[str]) -> Record:
    """A question as a row of training data without an answer, so that the rules of training rows apply to it.

    Control tokens in the text are plain text, and so is ``<image>`` inside a text without images. Otherwise each
    ``<image>`` tag is the place of one image; a single image needs no tag.

    Raises:
        DataError: there are not as many image tags as images, a text without images begins or ends with a tag, or no
            tokenizer can read the text.
    """
    return as_conversation([question], images)


def as_conversation(texts: Sequence[str], images: Sequence[str]) -> Record:
    """Like ``as_row``, for alternating questions and answers that end with a question."""
    who = ("human", "gpt")
    turns = [{"from": who[number % 2], "value": text} for number, text in enumerate((*texts, ""))]
    record = parse_row({"images": list(images), "conversations": turns}, "question", Path())
    return replace(record, turns=record.turns[: len(texts)])


def model_inputs(processor: Any, prompts: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> BatchFeature:
    """Token ids, mask and images of one-turn conversations, padded on the left. The ids are those of training.

    Args:
        images: images of each prompt, in the order of its tags.
    """
    rows = [as_row(prompt, ["image"] * len(own)) for prompt, own in zip(prompts, images, strict=True)]
    return row_inputs(processor, rows, images)


def row_inputs(processor: Any, records: Sequence[Record], images: Sequence[Sequence[Image.Image]]) -> BatchFeature:
    """Like ``model_inputs``, for conversations of any length, up to the start of the next answer."""
    encoder = encoder_for(processor)
    sizes = ([image.size for image in own] for own in images)
    rows = [torch.tensor(encoder.prompt(row, own)) for row, own in zip(records, sizes, strict=True)]
    padding = int(processor.tokenizer.pad_token_id or 0)  # never attended

    def padded(values: list[Tensor], filling: int) -> Tensor:
        return pad_sequence(values, batch_first=True, padding_value=filling, padding_side="left")

    inputs = {"input_ids": padded(rows, padding), "attention_mask": padded([torch.ones_like(row) for row in rows], 0)}
    shown = [[to_rgb(image) for image in own] for own in images if own]
    if isinstance(encoder, VlmEncoder):
        inputs |= ModelInputs(processor, encoder.image_token_id)(inputs["input_ids"], shown)
    elif shown:
        pixels = [student_pixels(processor.image_processor, image) for own in shown for image in own]
        inputs["pixel_values"] = torch.stack(pixels)
    return BatchFeature(inputs)


def precision() -> torch.dtype:
    """The precision in which ``load_to_ask`` loads: bfloat16 on a GPU, float32 on the CPU."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def load_to_ask(folder: str | Path) -> Student:
    """Loads a student for inference, on this process's GPU, or on the CPU if there is none."""
    student = load_student(folder, precision())
    if torch.cuda.is_available():
        avoid_plans_by_shape()
        student.model.to(f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}")
    return student


def room_for_answers(student: Student, inputs: BatchFeature) -> list[int]:
    """The number of the LLM's positions that each prompt leaves for its answer; below 1 if the prompt is too long."""
    room: list[int] = ((student.positions or sys.maxsize) - inputs["attention_mask"].sum(1)).tolist()
    return room


@torch.no_grad()
def answer(
    student: Student,
    prompts: Sequence[str],
    images: Sequence[Sequence[Image.Image]],
    max_new_tokens: int = 64,
    generate: Callable[..., Tensor] | None = None,
) -> list[str | None]:
    """Greedy answers to a batch of questions.

    Args:
        images: upright images of each question (``visper.data.images.open_image``), in the order of its tags; may be
            empty.
        generate: used in place of the model's own method.

    Returns:
        The answers' texts, without special tokens, stripped. None, with a warning, for a question that leaves no
        position of the LLM for its answer.

    Raises:
        DataError: see ``as_row``.
    """
    inputs = model_inputs(student.processor, prompts, images)
    room = room_for_answers(student, inputs)
    if min(room) < max_new_tokens and len(prompts) > 1:
        # Those without enough room one by one, because their room must not shorten the answers to others.
        tight = [[number] for number, left in enumerate(room) if left < max_new_tokens]
        together = [number for number, left in enumerate(room) if left >= max_new_tokens]
        said: dict[int, str | None] = {}
        for group in filter(None, [together, *tight]):
            own = [prompts[number] for number in group], [images[number] for number in group]
            said.update(zip(group, answer(student, *own, max_new_tokens, generate), strict=True))
        return [said[number] for number in range(len(prompts))]
    if min(room) < 1:
        tokens = inputs["input_ids"].shape[1]
        logger.warning("a question of %d tokens is not answered: the LLM has %d positions", tokens, student.positions)
        return [None]
    inputs = inputs.to(student.model.device, student.model.dtype)
    length = min(max_new_tokens, *room)
    generated = (generate or student.model.generate)(**inputs, max_new_tokens=length, **GREEDY)
    new = generated[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in student.processor.batch_decode(new, skip_special_tokens=True)]
