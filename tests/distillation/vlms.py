"""Tiny random vision-language models of transformers, each with a batch of two rows as its processor would make it."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as t
from torch import Tensor, nn

WIDTH, LAYERS, IMAGE, ENDS = 32, 3, 90, (92, 93)
TEXT: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
PATCHES = {"image_size": 16, "patch_size": 4}
QWEN_VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": WIDTH}
QWEN_VISION |= {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
QWEN_IDS = {"image_token_id": IMAGE, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}


def llava() -> nn.Module:
    vision = {"model_type": "clip_vision_model", **VISION, **PATCHES}
    text = {"model_type": "llama", **TEXT}
    return t.LlavaForConditionalGeneration(
        t.LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, vision_feature_layer=-1)
    )


def llava_onevision() -> nn.Module:
    vision = {"model_type": "siglip_vision_model", **VISION, **PATCHES, "vision_use_head": False}
    config = t.LlavaOnevisionConfig(
        vision_config=vision,
        text_config={"model_type": "qwen2", **TEXT},
        image_token_id=IMAGE,
        image_grid_pinpoints=[[16, 16], [16, 32], [32, 32]],
    )
    return t.LlavaOnevisionForConditionalGeneration(config)


def internvl() -> nn.Module:
    vision = {"model_type": "internvl_vision", **VISION, "image_size": [16, 16], "patch_size": [4, 4]}
    config = t.InternVLConfig(
        vision_config=vision, text_config={"model_type": "qwen2", **TEXT}, image_token_id=IMAGE, downsample_ratio=0.5
    )
    return t.InternVLForConditionalGeneration(config)


def smolvlm() -> nn.Module:
    config = t.SmolVLMConfig(
        vision_config={**VISION, **PATCHES},
        text_config={"model_type": "llama", **TEXT},
        image_token_id=IMAGE,
        scale_factor=2,
    )
    return t.SmolVLMForConditionalGeneration(config)


def gemma3() -> nn.Module:
    config = t.Gemma3Config(
        vision_config={**VISION, **PATCHES, "vision_use_head": False},
        text_config=TEXT,
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=92,
        eoi_token_index=93,
    )
    return t.Gemma3ForConditionalGeneration(config)


def gemma4() -> nn.Module:
    """With per-layer embeddings and an audio encoder, like the published E2B and E4B."""
    vision = {**VISION, "num_key_value_heads": 4, "head_dim": 8, "patch_size": 2, "pooling_kernel_size": 2}
    layers = ["sliding_attention", "full_attention", "full_attention"]
    text = {**TEXT, "global_head_dim": 8, "layer_types": layers, "num_kv_shared_layers": 1}
    text |= {"hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 99, "final_logit_softcapping": 30.0}
    audio = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "output_proj_dims": WIDTH}
    config = t.Gemma4Config(
        vision_config={**vision, "position_embedding_size": 99},
        text_config=text,
        audio_config={**audio, "subsampling_conv_channels": [4, 4]},
        image_token_id=IMAGE,
        boi_token_id=92,
        eoi_token_id=93,
        video_token_id=91,
        audio_token_id=94,
    )
    return t.Gemma4ForConditionalGeneration(config)


def qwen2_5_vl() -> nn.Module:
    vision = {**QWEN_VISION, "window_size": 16, "fullatt_block_indexes": [1]}
    return t.Qwen2_5_VLForConditionalGeneration(
        t.Qwen2_5_VLConfig(vision_config=vision, text_config={**TEXT, **ROPE}, **QWEN_IDS)
    )


def qwen3_vl() -> nn.Module:
    vision = {**QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    return t.Qwen3VLForConditionalGeneration(
        t.Qwen3VLConfig(vision_config=vision, text_config={**TEXT, **ROPE}, **QWEN_IDS)
    )


def qwen3_5() -> nn.Module:
    text: dict[str, Any] = {**TEXT, **ROPE, "layer_types": ["linear_attention"] * 2 + ["full_attention"]}
    text |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
    text |= {"linear_num_key_heads": 2, "linear_num_value_heads": 2}
    text["rope_parameters"] = {**ROPE["rope_parameters"], "partial_rotary_factor": 1.0}
    vision = {**QWEN_VISION, "num_position_embeddings": 16}
    return t.Qwen3_5ForConditionalGeneration(t.Qwen3_5Config(vision_config=vision, text_config=text, **QWEN_IDS))


def mistral3() -> nn.Module:
    vision = {"model_type": "pixtral", **VISION, "head_dim": 6, "image_size": 32, "patch_size": 4}
    text = {"model_type": "mistral", **TEXT}
    config = t.Mistral3Config(vision_config=vision, text_config=text, image_token_index=IMAGE)
    return t.Mistral3ForConditionalGeneration(config)


def squares(count: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(count, 3, 16, 16)}


def tiles_of_two_sizes() -> dict[str, Tensor]:
    """LLaVA-OneVision: a base view each, the first picture one tile, the second two side by side."""
    pixels = torch.randn(2, 3, 3, 16, 16)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[16, 16], [16, 32]])}


def grids_of_two_sizes() -> dict[str, Tensor]:
    """Qwen: pictures of 4 x 4 and 4 x 8 patches."""
    return {
        "pixel_values": torch.randn(16 + 32, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 8]]),
    }


def patches_of_two_sizes() -> dict[str, Tensor]:
    """Gemma 4: pictures of 4 x 4 and 8 x 4 patches, padded to one length."""
    places = torch.full((2, 32, 2), -1)
    places[0, :16] = torch.cartesian_prod(torch.arange(4), torch.arange(4)).flip(-1)
    places[1] = torch.cartesian_prod(torch.arange(4), torch.arange(8)).flip(-1)
    return {"pixel_values": torch.rand(2, 32, 3 * 2 * 2), "image_position_ids": places}


def padded_to_one_size() -> dict[str, Tensor]:
    """Mistral 3: pictures of 16 x 16 and 16 x 32 pixels."""
    return {"pixel_values": torch.randn(2, 3, 16, 32), "image_sizes": torch.tensor([[16, 16], [16, 32]])}


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]], tuple[int, int]]] = {
    "llava": (llava, lambda: squares(2), (16, 16)),
    # 16 of the base view, then the tiles' rows with a token behind each.
    "llava_onevision": (llava_onevision, tiles_of_two_sizes, (16 + 4 * 5, 16 + 4 * 9)),
    "internvl": (internvl, lambda: squares(3), (4, 8)),  # the second picture is two tiles
    "smolvlm": (smolvlm, lambda: {"pixel_values": torch.randn(2, 1, 3, 16, 16)}, (4, 4)),
    "gemma3": (gemma3, lambda: squares(2), (4, 4)),
    "gemma4": (gemma4, patches_of_two_sizes, (4, 8)),
    "qwen2_5_vl": (qwen2_5_vl, grids_of_two_sizes, (4, 8)),
    "qwen3_vl": (qwen3_vl, grids_of_two_sizes, (4, 8)),
    "qwen3_5": (qwen3_5, grids_of_two_sizes, (4, 8)),
    "mistral3": (mistral3, padded_to_one_size, (4, 8)),
}
"""Family -> its model, the pixels of two pictures as its processor gives them, and their image tokens."""


def build(family: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model and a batch of two rows with labels, padded to one length."""
    torch.manual_seed(0)
    make, pixels, spans = MODELS[family]
    rows = [[1, 5, ENDS[0], *[IMAGE] * span, ENDS[1], *range(10, 16)] for span in spans]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    labels = ids.masked_fill((ids >= IMAGE) | (mask == 0), -100)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, **pixels()}
    if family == "gemma3":
        batch["token_type_ids"] = (ids == IMAGE).long()
    if family.startswith("qwen") or family == "gemma4":
        batch["mm_token_type_ids"] = (ids == IMAGE).int()
    return make(), batch
