"""Image encoders' features against the transformers model: every family by one kind."""

import pytest
import torch
from transformers import AutoConfig, AutoModel, SiglipConfig, SiglipModel

from tests import tiny_teachers
from visper.distillation.teachers import build_teacher, target_spec

FAMILIES = {
    # family: what differs in its configuration, tokens before the patches
    "dinov2": ({"mlp_ratio": 1}, 1),
    "dinov2_with_registers": ({"mlp_ratio": 1, "num_register_tokens": 3}, 4),
    "dinov3_vit": ({"num_register_tokens": 2}, 3),
    "siglip_vision_model": ({}, 0),
    "clip_vision_model": ({}, 1),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    changes, before = FAMILIES[request.param]
    return tiny_teachers.save_vision(tmp_path_factory.mktemp(request.param), request.param, **changes), before


@pytest.mark.parametrize("layer", [None, -2, 1])
def test_targets_are_the_models_own_patch_tokens(family, layer):
    """The same tensors in the same arithmetic: equal to the last bit."""
    folder, before = family
    teacher = build_teacher("features", folder, layer=layer)
    assert (teacher.spec.tokens, teacher.spec.width, teacher.spec.grid) == (4, 16, (2, 2))
    pixels = torch.rand(2, 3, 28, 28)
    with torch.no_grad():
        output = AutoModel.from_pretrained(folder).eval()(pixels, output_hidden_states=True)
    states = output.last_hidden_state if layer is None else output.hidden_states[layer]
    assert states.shape[1] == 4 + before
    assert torch.equal(teacher(pixels), states[:, before:])
    assert teacher.decode(teacher(pixels)).shape == (2, 3, 2, 2)


def test_another_size_gives_another_grid(family):
    teacher = build_teacher("features", family[0], size=42)
    assert teacher.spec.grid == (3, 3) and target_spec("features", family[0], size=42) == teacher.spec
    assert teacher(torch.rand(1, 3, 42, 42)).shape == (1, 9, 16)


def test_the_image_half_of_a_whole_siglip_is_taken(tmp_path):
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = SiglipConfig(
        vision_config={**small, "image_size": 28, "patch_size": 14}, text_config={**small, "vocab_size": 9}
    )
    model = SiglipModel(config).eval()
    tiny_teachers.save(model, tmp_path)
    teacher = build_teacher("features", tmp_path)
    pixels = torch.rand(1, 3, 28, 28)
    with torch.no_grad():
        assert torch.equal(teacher(pixels), model.vision_model(pixels).last_hidden_state)


def test_a_feature_map_is_read_row_by_row(tmp_path):
    folder = tiny_teachers.save_vision(
        tmp_path, "convnextv2", hidden_sizes=[4, 4, 8, 12], depths=[1, 1, 1, 1], image_size=64, patch_size=4
    )
    teacher = build_teacher("features", folder)
    assert (teacher.spec.grid, teacher.spec.width) == ((2, 2), 12) and target_spec("features", folder) == teacher.spec
    pixels = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        whole = AutoModel.from_pretrained(folder).eval()(pixels).last_hidden_state
    assert torch.equal(teacher(pixels)[:, 1], whole[:, :, 0, 1])


def test_faults_say_what_to_do(tmp_path):
    folder = tiny_teachers.save_vision(tmp_path / "dino", "dinov2", mlp_ratio=1)
    with pytest.raises(ValueError, match=r"'layer' is 9, but .* has hidden states 0 \(embeddings\) to 4"):
        build_teacher("features", folder, layer=9)
    with pytest.raises(ValueError, match=r"cells of 14 pixels.*set 'size' to 28 or 42"):
        build_teacher("features", folder, size=30)
    ragged = tiny_teachers.save_vision(tmp_path / "naflex", "siglip2_vision_model", num_patches=4)
    with pytest.raises(ValueError, match="ragged patches"):
        build_teacher("features", ragged)


@pytest.mark.parametrize(("family", "changes"), [("yolos", {"image_size": [28, 28]}), ("vit_mae", {"mask_ratio": 0.0})])
def test_an_encoder_whose_last_tokens_are_not_its_patches_in_order_is_refused(tmp_path, family, changes):
    folder = tiny_teachers.save_vision(tmp_path, family, **changes)
    with pytest.raises(ValueError, match=r"the last 4 tokens of .* are not its patches in order"):
        build_teacher("features", folder)


def test_sams_inner_layers_have_the_grid_of_their_patches(tmp_path):
    more = {"output_channels": 6, "mlp_dim": 16, "window_size": 1, "global_attn_indexes": [1]}
    folder = tiny_teachers.save_vision(tmp_path, "sam_vision_model", **more)
    for layer, width in ((None, 6), (-2, 16)):
        teacher = build_teacher("features", folder, layer=layer)
        assert (teacher.spec.grid, teacher.spec.width) == ((2, 2), width)
    assert target_spec("features", folder).width == 6
    pixels = torch.rand(1, 3, 28, 28)
    with torch.no_grad():
        inner = AutoModel.from_pretrained(folder).eval()(pixels, output_hidden_states=True).hidden_states[-2]
    assert torch.equal(teacher(pixels)[:, 1], inner[:, 0, 1])


def test_an_encoder_without_a_patch_size_is_read_at_a_layer_that_gives_a_map(tmp_path):
    stages = {"hidden_sizes": [4, 4, 8, 12], "depths": [1, 1, 1, 1], "image_size": 64}
    folder = tiny_teachers.save(AutoModel.from_config(AutoConfig.for_model("dinov3_convnext", **stages)), tmp_path)
    with pytest.raises(ValueError, match="set 'layer' to one whose output is a map"):
        build_teacher("features", folder)
    assert build_teacher("features", folder, layer=-1).spec.grid == (2, 2)


def test_a_size_that_the_encoder_rejects_is_named(tmp_path):
    folder = tiny_teachers.save_vision(tmp_path / "aimv2", "aimv2_vision_model")  # its positions are for one size
    with pytest.raises(ValueError, match=r"does not accept images of 56 px .*remove 'size' to use its own 28"):
        build_teacher("features", folder, size=56)
