"""Tiny random image-text-to-text models of transformers as ordinary folders, with processors and chat templates."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as t
from torch import nn

from tests.distillation.vlms import MODELS
from tests.tiny import byte_tokenizer

FAMILIES = (
    "llava_onevision",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_5",
    "internvl",
    "smolvlm",
    "mistral3",
    "gemma3",
    "gemma4",
)

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_ONEVISION = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + content['text'] }}"
    "{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{% generation %}"
    "{{ '\n' + content['text'] }}{% endgeneration %}{% endfor %}{% endif %}{{'<|im_end|>'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As published with llava-hf/llava-onevision-qwen2-0.5b-ov-hf, without its videos."""
_SMOL = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""As published with SmolVLM, without its videos."""
_GEMMA = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<start_of_image>{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_GEMMA_4 = (
    "{{ bos_token }}{% for message in messages %}<|turn>"
    "{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '\n\n<|image|>\n\n' }}{% else %}{{ part['text'] | trim }}{% endif %}"
    "{% endfor %}<turn|>\n{% endfor %}{% if add_generation_prompt %}<|turn>model\n{% endif %}"
)


def tokenizer_with(tokens: list[str], named: dict[str, str] | None = None) -> Any:
    """The byte tokenizer with more special tokens; ``named`` ones become its attributes."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [*tokens, *(named or {}).values()]})
    if named:
        tokenizer = type(tokenizer)(
            tokenizer_object=tokenizer.backend_tokenizer,
            bos_token="<s>",
            eos_token="</s>",
            pad_token="<unused>",
            extra_special_tokens=named,
        )
    tokenizer.chat_template = None
    return tokenizer


def _onevision() -> Any:
    tokenizer = tokenizer_with(["<|im_start|>", "<|im_end|>", "<image>", "<video>"])
    images = t.LlavaOnevisionImageProcessor(
        size={"height": 16, "width": 16}, image_grid_pinpoints=[[16, 16], [16, 32], [32, 32]]
    )
    return t.LlavaOnevisionProcessor(
        images,
        tokenizer,
        t.LlavaOnevisionVideoProcessor(),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=_ONEVISION,
    )


def qwen_processor(kind: Callable[..., Any], videos: Callable[..., Any]) -> Any:
    pads = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    tokenizer = tokenizer_with(["<|im_start|>", "<|im_end|>", *pads])
    images = t.Qwen2VLImageProcessor(patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 1024})
    template = CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    if kind is t.Qwen2_5_VLProcessor:  # as published: a system turn where a conversation has none
        system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        template = "{% if messages[0]['role'] != 'system' %}" + system + "{% endif %}" + template
    return kind(images, tokenizer, videos(), chat_template=template)


def _internvl() -> Any:
    named = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tokenizer = tokenizer_with(["<|im_start|>", "<|im_end|>"], {**named, "video_token": "<video>"})
    images = t.GotOcr2ImageProcessor(size={"height": 16, "width": 16}, max_patches=4)
    template = CHATML.replace("IMAGE", "<IMG_CONTEXT>\n")
    return t.InternVLProcessor(
        images, tokenizer, t.InternVLVideoProcessor(), image_seq_length=4, chat_template=template
    )


def _smolvlm() -> Any:
    places = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    marks = ["<fake_token_around_image>", "<global-img>", "<image>", "<video>", "<end_of_utterance>", "<|im_start|>"]
    images = t.SmolVLMImageProcessor(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    tokenizer = tokenizer_with([*marks, *places])
    return t.SmolVLMProcessor(images, tokenizer, t.SmolVLMVideoProcessor(), image_seq_len=4, chat_template=_SMOL)


def _gemma3() -> Any:
    named = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = tokenizer_with(["<start_of_turn>", "<end_of_turn>"], named)
    images = t.Gemma3ImageProcessor(size={"height": 16, "width": 16})
    return t.Gemma3Processor(images, tokenizer, chat_template=_GEMMA, image_seq_length=4)


def _gemma4() -> Any:
    named = {"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>"}
    named |= {"audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>"}
    return t.Gemma4Processor(
        t.Gemma4AudioFeatureExtractor(),
        t.Gemma4ImageProcessor(patch_size=2, pooling_kernel_size=2, max_soft_tokens=70),
        tokenizer_with(["<|turn>", "<turn|>", "<|video|>"], named),
        t.Gemma4VideoProcessor(),
        chat_template=_GEMMA_4,
    )


def _mistral3() -> Any:
    return t.PixtralProcessor(
        t.PixtralImageProcessor(size={"longest_edge": 32}, patch_size={"height": 4, "width": 4}),
        tokenizer_with(["<|im_start|>", "<|im_end|>", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]),
        patch_size=4,
        spatial_merge_size=2,
        chat_template=CHATML.replace("IMAGE", "[IMG]"),
    )


PROCESSORS: dict[str, Callable[[], Any]] = {
    "llava_onevision": _onevision,
    "qwen2_5_vl": lambda: qwen_processor(t.Qwen2_5_VLProcessor, t.Qwen2VLVideoProcessor),
    "qwen3_vl": lambda: qwen_processor(t.Qwen3VLProcessor, t.Qwen3VLVideoProcessor),
    "internvl": _internvl,
    "smolvlm": _smolvlm,
    "qwen3_5": lambda: qwen_processor(t.Qwen3VLProcessor, t.Qwen3VLVideoProcessor),
    "mistral3": _mistral3,
    "gemma3": _gemma3,
    "gemma4": _gemma4,
}
IDS = {
    "llava_onevision": {"image_token_id": "<image>", "video_token_id": "<video>"},
    "internvl": {"image_token_id": "<IMG_CONTEXT>"},
    "smolvlm": {"image_token_id": "<image>"},
    "gemma3": {"image_token_id": "<image_soft_token>", "boi_token_id": "<start_of_image>"}
    | {"eoi_token_id": "<end_of_image>"},
    "mistral3": {"image_token_id": "[IMG]"},
    "gemma4": {"image_token_id": "<|image|>", "boi_token_id": "<|image>", "eoi_token_id": "<image|>"}
    | {"audio_token_id": "<|audio|>", "video_token_id": "<|video|>"},
} | {
    family: {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    | {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    for family in ("qwen2_5_vl", "qwen3_vl", "qwen3_5")
}
"""What each family's configuration names by id."""


def save_vlm(folder: Path, family: str) -> Path:
    """A model of ``family`` with random weights and its processor."""
    torch.manual_seed(0)
    made: Any = MODELS[family][0]()
    return save_made(folder, made.config, PROCESSORS[family](), IDS[family])


def save_made(folder: Path, config: Any, processor: Any, ids: dict[str, str]) -> Path:
    """A model with random weights and its processor; ``ids``: what its configuration names by id."""
    torch.manual_seed(0)
    for name, token in ids.items():
        setattr(config, name, processor.tokenizer.convert_tokens_to_ids(token))
    config.text_config.vocab_size = config.text_config.vocab_size_per_layer_input = len(processor.tokenizer)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config.text_config, name, getattr(processor.tokenizer, name))
    model: Any = t.AutoModelForImageTextToText.from_config(config)
    _widen(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@torch.no_grad()
def _widen(model: nn.Module) -> None:
    """Larger weights than transformers begins with (Gemma's projector with zeros), so that differences show."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.1)
