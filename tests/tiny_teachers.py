"""Tiny random teachers of every kind from transformers, saved as the folders their published ones come in."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    OneFormerConfig,
    OneFormerModel,
    PreTrainedModel,
)

from tests.tiny import byte_tokenizer

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


def save(model: PreTrainedModel, folder: Path, processor_folder: Path | None = None) -> Path:
    """The model with an image processor of unusual colors."""
    model.save_pretrained(folder)
    CLIPImageProcessor(image_mean=MEAN, image_std=STD).save_pretrained(processor_folder or folder)
    return folder


def depth_model(width: int = 16, layers: int = 4, levels: tuple[int, ...] = (1, 2, 3, 4), heads: int = 2) -> Any:
    """A random Depth Anything of 28 pixels (56 in tests: positions are interpolated, as published at 336).

    Fresh layers are alike (zero biases, unit scales) and give next to no depth: noise on all weights lets mix-ups show.
    """
    torch.manual_seed(0)
    backbone = AutoConfig.for_model(
        "dinov2", hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, mlp_ratio=1, image_size=28,
        patch_size=14, out_indices=list(levels), reshape_hidden_states=False,
    )  # fmt: skip
    config = DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=width, neck_hidden_sizes=[4, 5, 6, 7], fusion_hidden_size=8,
        head_hidden_size=4,
    )  # fmt: skip
    model = DepthAnythingForDepthEstimation(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.head.conv3.bias.fill_(1.0)  # the head ends in a ReLU
    return model


def save_oneformer(folder: Path) -> Path:
    """A random OneFormer of 64 pixels on a Swin of four stages, under the names of the segmentation model."""
    torch.manual_seed(0)
    backbone = AutoConfig.for_model(
        "swin", image_size=64, embed_dim=4, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = OneFormerConfig(
        backbone_config=backbone, hidden_dim=32, conv_dim=32, mask_dim=32, num_attention_heads=2, encoder_layers=1,
        decoder_layers=2, num_queries=5, dim_feedforward=8, encoder_feedforward_dim=8, query_dec_layers=1,
        text_encoder_width=8, text_encoder_num_layers=1, text_encoder_vocab_size=20, norm="BN",
        id2label={0: "cat", 1: "tree", 2: "sky"},
    )  # fmt: skip
    save(OneFormerModel(config), folder)
    # Published checkpoints are of the segmentation model, which holds this one under "model" (and wants scipy).
    weights = load_file(folder / "model.safetensors")
    renamed = {f"model.{name}": value for name, value in weights.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    byte_tokenizer().save_pretrained(folder)
    return folder


def save_unclip(folder: Path) -> Path:
    """The image encoder of a pipeline and its image processor, in the pipeline's folders."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14,
        projection_dim=6,
    )  # fmt: skip
    save(CLIPVisionModelWithProjection(config), folder / "image_encoder", folder / "feature_extractor")
    return folder


def save_diffusion(folder: Path) -> Path:
    """``save_unclip`` with the rest of the pipeline around it. Needs diffusers."""
    from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableUnCLIPImg2ImgPipeline, UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
    from transformers import CLIPTextConfig, CLIPTextModel

    save_unclip(folder)
    torch.manual_seed(1)
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = 4
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=4, eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), block_out_channels=(4,),
        norm_num_groups=2, attention_head_dim=2, class_embed_type="projection", layers_per_block=1,
        projection_class_embeddings_input_dim=12, cross_attention_dim=8, mid_block_type=None,
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, sample_size=8)
    StableUnCLIPImg2ImgPipeline(
        feature_extractor=CLIPImageProcessor.from_pretrained(folder / "feature_extractor"),
        image_encoder=CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder"),
        image_normalizer=StableUnCLIPImageNormalizer(embedding_dim=6),
        image_noising_scheduler=DDPMScheduler(),
        tokenizer=tokenizer, text_encoder=CLIPTextModel(text), unet=unet, scheduler=DDIMScheduler(), vae=vae,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def save_vision(folder: Path, model_type: str, **changes: Any) -> Path:
    """A random image encoder of a family, four layers of width 16."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16}
    config = AutoConfig.for_model(model_type, **{**sizes, "image_size": 28, "patch_size": 14, **changes})
    return save(AutoModel.from_config(config), folder)
