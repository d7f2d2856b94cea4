"""Asks a student: pictures and questions in, greedy answers out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from transformers import BatchFeature, LlavaProcessor

from visper.common.errors import ConfigError
from visper.data.chat import lacks_first_token
from visper.model import Student, load_student


def conversation(prompt: str, has_image: bool) -> list[dict[str, object]]:
    """One user turn, as the chat template wants it: the picture first, as in training."""
    content: list[dict[str, str]] = [{"type": "image"}] if has_image else []
    content.append({"type": "text", "text": prompt})
    return [{"role": "user", "content": content}]


def model_inputs(processor: LlavaProcessor, prompts: Sequence[str], pictures: Sequence[Image.Image]) -> BatchFeature:
    """Ids, mask and pixels of one-turn conversations, padded on the left; the ids that training would give them.

    Args:
        pictures: one for each prompt, or none at all.
    """
    texts = [
        processor.apply_chat_template(conversation(prompt, bool(pictures)), add_generation_prompt=True, tokenize=False)
        for prompt in prompts
    ]
    return processor(
        text=texts,
        images=list(pictures) or None,
        return_tensors="pt",
        padding=True,
        padding_side="left",
        add_special_tokens=lacks_first_token(processor.tokenizer, texts[0]),
        return_token_type_ids=False,
    )


def load_to_ask(folder: str | Path) -> Student:
    """A student ready to answer: on a GPU in bfloat16 where there is one, else on the CPU in float32."""
    if not torch.cuda.is_available():
        return load_student(folder)
    student = load_student(folder, torch.bfloat16)
    student.model.to("cuda")
    return student


@torch.inference_mode()
def answer(
    student: Student, prompts: Sequence[str], images: Sequence[Image.Image | None], max_new_tokens: int = 64
) -> list[str]:
    """Greedy answers of one batch.

    Args:
        prompts: one question each.
        images: one picture (or None) each. A batch holds either pictures only or none.

    Returns:
        The answers' texts, without special tokens, stripped.

    Raises:
        ValueError: pictures and no pictures in one batch.
    """
    pictures = [image for image in images if image is not None]
    if pictures and len(pictures) != len(images):
        raise ConfigError("a batch mixes questions with and without a picture: ask them apart")
    inputs = model_inputs(student.processor, prompts, pictures).to(student.model.device, student.model.dtype)
    generated = student.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = generated[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in student.processor.batch_decode(new, skip_special_tokens=True)]
