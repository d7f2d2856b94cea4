"""Teachers from transformers, on tiny random models in folders."""

import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    OneFormerConfig,
    OneFormerModel,
)

from visper.distillation.teachers import build_teacher

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


def save(model, folder, processor_folder=None):
    torch.manual_seed(0)
    model.save_pretrained(folder)
    CLIPImageProcessor(image_mean=MEAN, image_std=STD).save_pretrained(processor_folder or folder)
    return folder


@pytest.fixture(scope="module")
def depth_folder(tmp_path_factory):
    backbone = AutoConfig.for_model(
        "dinov2", hidden_size=16, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=1, image_size=28, patch_size=14,
        out_indices=[1, 2, 3, 4], reshape_hidden_states=False,
    )  # fmt: skip
    config = DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=16, neck_hidden_sizes=[4, 4, 4, 4], fusion_hidden_size=4,
        head_hidden_size=4,
    )  # fmt: skip
    torch.manual_seed(0)
    return save(DepthAnythingForDepthEstimation(config), tmp_path_factory.mktemp("depth"))


@pytest.fixture(scope="module")
def oneformer_folder(tmp_path_factory):
    backbone = AutoConfig.for_model(
        "swin", image_size=64, embed_dim=4, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = OneFormerConfig(
        backbone_config=backbone, hidden_dim=32, conv_dim=32, mask_dim=32, num_attention_heads=2, encoder_layers=1,
        decoder_layers=2, num_queries=5, dim_feedforward=8, encoder_feedforward_dim=8, query_dec_layers=1,
        text_encoder_width=8, text_encoder_num_layers=1, text_encoder_vocab_size=20, norm="BN",
    )  # fmt: skip
    torch.manual_seed(0)
    folder = save(OneFormerModel(config), tmp_path_factory.mktemp("oneformer"))
    # Published checkpoints are of the segmentation model, which holds this one under "model" (and wants scipy).
    weights = load_file(folder / "model.safetensors")
    renamed = {f"model.{name}": value for name, value in weights.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def unclip_folder(tmp_path_factory):
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14,
        projection_dim=6,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("unclip")
    torch.manual_seed(0)
    save(CLIPVisionModelWithProjection(config), folder / "image_encoder", folder / "feature_extractor")
    return folder


def test_depth_target_is_the_mean_of_the_levels_without_class_token(depth_folder):
    teacher = build_teacher("depth_anything", depth_folder, size=56)
    assert (teacher.spec.tokens, teacher.spec.width, teacher.spec.grid) == (16, 16, (4, 4))
    pixels = torch.rand(2, 3, 56, 56)
    levels = teacher.model.backbone(pixels).feature_maps
    assert len(levels) == 4 and levels[0].shape == (2, 17, 16)
    torch.testing.assert_close(teacher(pixels), sum(level[:, 1:] for level in levels) / 4)


def test_depth_decoding_is_the_models_own_head(depth_folder):
    """Where all levels are alike, drawing the target gives exactly the depth the model itself predicts."""
    teacher = build_teacher("depth_anything", depth_folder, size=56)
    pixels = torch.rand(2, 3, 56, 56)
    backbone = teacher.model.backbone
    original = backbone.forward_with_filtered_kwargs

    def alike(*args, **kwargs):
        out = original(*args, **kwargs)
        mean = torch.stack(list(out.feature_maps)).mean(0)
        out.feature_maps = (mean,) * 4
        return out

    backbone.forward_with_filtered_kwargs = alike
    depth = teacher.model(pixels).predicted_depth
    low, high = depth.amin((1, 2), keepdim=True), depth.amax((1, 2), keepdim=True)
    drawn = teacher.decode(teacher(pixels))
    assert drawn.shape == (2, 3, 56, 56)
    torch.testing.assert_close(drawn[:, 0], (depth - low) / (high - low).clamp(min=1e-6), rtol=0, atol=1e-4)


def test_depth_size_must_fit_the_patches(depth_folder):
    with pytest.raises(ValueError, match=r"cells of 14 pixels.*set 'size' to 56 or 70"):
        build_teacher("depth_anything", depth_folder, size=60)


def test_segmentation_target_is_the_last_stage_row_by_row(oneformer_folder):
    teacher = build_teacher("oneformer", oneformer_folder, size=64)
    assert (teacher.spec.tokens, teacher.spec.width, teacher.spec.grid) == (4, 32, (2, 2))
    whole = OneFormerModel.from_pretrained(oneformer_folder).eval()
    pixels = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        last = whole.pixel_level_module(pixels).encoder_features[-1]
    torch.testing.assert_close(teacher(pixels)[:, 1], last[:, :, 0, 1])
    assert teacher.decode(teacher(pixels)).shape == (2, 3, 2, 2)


def test_unclip_target_is_the_projected_image_embedding(unclip_folder):
    teacher = build_teacher("unclip", unclip_folder, subfolder="image_encoder")
    assert (teacher.spec.tokens, teacher.spec.width, teacher.spec.grid) == (1, 6, None)
    pixels = torch.rand(2, 3, 28, 28)
    whole = CLIPVisionModelWithProjection.from_pretrained(unclip_folder / "image_encoder").eval()
    with torch.no_grad():
        torch.testing.assert_close(teacher(pixels)[:, 0], whole(pixels).image_embeds)
    assert teacher.decode(teacher(pixels)).shape[:2] == (2, 3)


@pytest.mark.parametrize(
    ("kind", "folder", "options"),
    [
        ("depth_anything", "depth_folder", {"size": 56}),
        ("oneformer", "oneformer_folder", {"size": 64}),
        ("unclip", "unclip_folder", {"subfolder": "image_encoder"}),
    ],
)
def test_images_are_normalised_as_the_model_was_trained(kind, folder, options, request):
    teacher = build_teacher(kind, request.getfixturevalue(folder), **options)
    pixels = teacher.preprocess(Image.new("RGB", (30, 20), (255, 0, 0)))
    expected = torch.tensor([(1 - 0.4) / 0.2, (0 - 0.5) / 0.25, (0 - 0.6) / 0.3])
    torch.testing.assert_close(pixels[:, 3, 3], expected, rtol=1e-4, atol=1e-4)
    assert teacher(pixels[None]).shape == (1, teacher.spec.tokens, teacher.spec.width)


def test_a_model_without_image_processor_is_refused(depth_folder, tmp_path):
    DepthAnythingForDepthEstimation.from_pretrained(depth_folder).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"preprocessor_config.json"):
        build_teacher("depth_anything", tmp_path, size=56)


def test_a_teacher_that_would_be_random_in_part_is_refused(unclip_folder, tmp_path):
    folder = tmp_path / "partial"
    shutil.copytree(unclip_folder, folder)
    weights = load_file(folder / "image_encoder" / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "image_encoder" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights of CLIPVisionModelWithProjection, such as 'visual_proj"):
        build_teacher("unclip", folder, subfolder="image_encoder")
