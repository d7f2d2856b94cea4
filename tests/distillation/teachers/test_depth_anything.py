"""Depth Anything against the transformers model, and its original files."""

import os
import pickle

import pytest
import torch

from tests import tiny_teachers
from visper.distillation.teachers import build_teacher, target_spec
from visper.distillation.teachers.depth_original import from_original, original_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_teachers.save(tiny_teachers.depth_model(), tmp_path_factory.mktemp("depth"))


def published_names(model):
    """The state of a transformers model under the names of Depth-Anything-V2's own code, written out one by one."""
    theirs = model.state_dict()
    ours = {
        "pretrained.cls_token": theirs["backbone.embeddings.cls_token"],
        "pretrained.mask_token": theirs["backbone.embeddings.mask_token"],
        "pretrained.pos_embed": theirs["backbone.embeddings.position_embeddings"],
    }

    def put(name, source, kinds=("weight", "bias")):
        ours.update({f"{name}.{kind}": theirs[f"{source}.{kind}"] for kind in kinds})

    put("pretrained.patch_embed.proj", "backbone.embeddings.patch_embeddings.projection")
    put("pretrained.norm", "backbone.layernorm")
    for n, layer in enumerate(model.backbone.encoder.layer):
        block, source = f"pretrained.blocks.{n}", f"backbone.encoder.layer.{n}"
        for part in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
            put(f"{block}.{part}", f"{source}.{part}")
        linears = [module for module in layer.attention.modules() if isinstance(module, torch.nn.Linear)]
        for kind in ("weight", "bias"):
            ours[f"{block}.attn.qkv.{kind}"] = torch.cat([getattr(linear, kind) for linear in linears[:3]]).detach()
            ours[f"{block}.attn.proj.{kind}"] = getattr(linears[3], kind).detach()
        for k in (1, 2):
            ours[f"{block}.ls{k}.gamma"] = theirs[f"{source}.layer_scale{k}.lambda1"]
    for n in range(4):
        put(f"depth_head.projects.{n}", f"neck.reassemble_stage.layers.{n}.projection")
        if n != 2:
            put(f"depth_head.resize_layers.{n}", f"neck.reassemble_stage.layers.{n}.resize")
        put(f"depth_head.scratch.layer{n + 1}_rn", f"neck.convs.{n}", ("weight",))
        fusion, source = f"depth_head.scratch.refinenet{4 - n}", f"neck.fusion_stage.layers.{n}"
        put(f"{fusion}.out_conv", f"{source}.projection")
        for k in (1, 2):
            for c in (1, 2):
                put(f"{fusion}.resConfUnit{k}.conv{c}", f"{source}.residual_layer{k}.convolution{c}")
    for name, source in (("output_conv1", "conv1"), ("output_conv2.0", "conv2"), ("output_conv2.2", "conv3")):
        put(f"depth_head.scratch.{name}", f"head.{source}")
    return ours


@pytest.fixture(scope="module")
def small():
    """12 blocks and heads 64 wide, as Small and Base have them; the rest tiny."""
    return tiny_teachers.depth_model(width=64, layers=12, levels=(3, 6, 9, 12), heads=1)


@pytest.fixture(scope="module")
def original(small, tmp_path_factory):
    path = tmp_path_factory.mktemp("original") / "depth_anything_v2_tiny.pth"
    torch.save(published_names(small), path)
    return path


def test_target_is_the_mean_of_the_levels_without_class_token(folder):
    teacher = build_teacher("depth_anything", folder, size=56)
    assert (teacher.spec.tokens, teacher.spec.width, teacher.spec.grid) == (16, 16, (4, 4))
    pixels = torch.rand(2, 3, 56, 56)
    levels = teacher.model.backbone(pixels).feature_maps
    assert len(levels) == 4 and levels[0].shape == (2, 17, 16)
    torch.testing.assert_close(teacher(pixels), sum(level[:, 1:] for level in levels) / 4)


def test_decoding_is_the_models_own_head(folder):
    """Where all levels are alike, drawing the target gives exactly the depth the model itself predicts: measured 0."""
    teacher = build_teacher("depth_anything", folder, size=56)
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
    assert (high - low).min() > 1e-3
    drawn = teacher.decode(teacher(pixels))
    assert drawn.shape == (2, 3, 56, 56)
    torch.testing.assert_close(drawn[:, 0], (depth - low) / (high - low), rtol=0, atol=1e-6)


def test_size_must_fit_the_patches(folder):
    with pytest.raises(ValueError, match=r"cells of 14 pixels.*set 'size' to 56 or 70"):
        build_teacher("depth_anything", folder, size=60)


def test_an_original_file_is_the_transformers_model(small, original):
    """The same tensors in the same arithmetic: equal to the last bit."""
    teacher = build_teacher("depth_anything", original, size=56)
    pixels = torch.rand(2, 3, 56, 56)
    with torch.no_grad():
        assert torch.equal(teacher.model(pixels).predicted_depth, small(pixels).predicted_depth)
        levels = small.backbone(pixels).feature_maps
    assert torch.equal(teacher(pixels), torch.stack([level[:, 1:] for level in levels]).mean(0))
    assert teacher.preprocess.mean == (0.485, 0.456, 0.406)
    assert target_spec("depth_anything", original, size=56) == teacher.spec
    assert teacher.decode(teacher(pixels)).shape == (2, 3, 56, 56)
    assert not [name for name, tensor in (*teacher.named_parameters(), *teacher.named_buffers()) if tensor.is_meta]


def test_every_name_of_the_published_large_file_has_its_place(golden):
    """Full size, without memory: 407 names and shapes of the file, each put somewhere, nothing left over."""
    names = golden.full_size("teacher dav2_backbone")
    assert len(names) == 407
    model = from_original({name: torch.empty(shape, device="meta") for name, shape in names.items()})
    config = model.config
    assert (config.backbone_config.num_hidden_layers, config.backbone_config.num_attention_heads) == (24, 16)
    assert list(config.backbone_config.out_indices) == [5, 12, 18, 24]
    assert (config.reassemble_hidden_size, list(config.neck_hidden_sizes)) == (1024, [256, 512, 1024, 1024])
    assert config.backbone_config.image_size == 518


@pytest.mark.parametrize(
    ("width", "neck", "fusion"), [(384, [48, 96, 192, 384], 64), (768, [96, 192, 384, 768], 128)], ids=["small", "base"]
)
def test_small_and_base_are_told_by_their_shapes(width, neck, fusion):
    shapes = {
        "pretrained.pos_embed": (1, 1370, width),
        "pretrained.patch_embed.proj.weight": (width, 3, 14, 14),
        "depth_head.scratch.layer1_rn.weight": (fusion, neck[0], 3, 3),
        "depth_head.scratch.output_conv2.0.weight": (32, fusion // 2, 3, 3),
        **{f"depth_head.projects.{n}.weight": (neck[n], width, 1, 1) for n in range(4)},
        **{f"pretrained.blocks.{n}.mlp.fc1.weight": (4 * width, width) for n in range(12)},
    }
    config = original_config({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    assert config.backbone_config.num_attention_heads == width // 64 and config.backbone_config.mlp_ratio == 4
    assert list(config.backbone_config.out_indices) == [3, 6, 9, 12]
    assert (list(config.neck_hidden_sizes), config.fusion_hidden_size) == (neck, fusion)


def test_other_names_are_listed(small, tmp_path):
    state = published_names(small)
    state["pretrained.blocks.0.mlp.w12.weight"] = state.pop("pretrained.blocks.0.ls1.gamma")
    torch.save(state, tmp_path / "other.pth")
    message = r"unknown pretrained.blocks.0.mlp.w12.weight; missing .* backbone.encoder.layer.0.layer_scale1.lambda1"
    with pytest.raises(ValueError, match=message):
        build_teacher("depth_anything", tmp_path / "other.pth")


def test_a_file_of_another_model_is_refused(tmp_path):
    torch.save({"model.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other.pth': not a Depth-Anything-V2.*unknown model.weight"):
        build_teacher("depth_anything", tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"no file '.*absent.pth'"):
        build_teacher("depth_anything", tmp_path / "absent.pth")


def test_shapes_that_fit_nothing_are_named(small, tmp_path):
    state = published_names(small)
    state["pretrained.norm.weight"] = torch.zeros(3)
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"shapes that fit no Depth-Anything-V2.*\n.*layernorm"):
        build_teacher("depth_anything", tmp_path / "other.pth")


class _Harm:
    def __reduce__(self):
        return os.getcwd, ()


def test_a_file_with_code_is_never_run(tmp_path):
    (tmp_path / "harm.pth").write_bytes(pickle.dumps(_Harm()))
    with pytest.raises(ValueError, match="cannot be read as a file of tensors"):
        build_teacher("depth_anything", tmp_path / "harm.pth")
