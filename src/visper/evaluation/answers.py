"""Asks a student: pictures and questions in, greedy answers out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image

from visper.model import Student


def conversation(prompt: str, has_image: bool) -> list[dict[str, object]]:
    """One user turn, as the chat template wants it: the picture first, as in training."""
    content: list[dict[str, str]] = [{"type": "image"}] if has_image else []
    content.append({"type": "text", "text": prompt})
    return [{"role": "user", "content": content}]


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
        raise ValueError("a batch mixes questions with and without a picture: ask them apart")
    texts = [
        student.processor.apply_chat_template(
            conversation(prompt, image is not None), add_generation_prompt=True, tokenize=False
        )
        for prompt, image in zip(prompts, images, strict=True)
    ]
    inputs = student.processor(
        text=texts,
        images=pictures or None,
        return_tensors="pt",
        padding=True,
        padding_side="left",
        add_special_tokens=False,  # the template writes them
        return_token_type_ids=False,
    ).to(student.model.device, student.model.dtype)
    generated = student.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = generated[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in student.processor.batch_decode(new, skip_special_tokens=True)]
