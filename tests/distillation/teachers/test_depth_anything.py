"""Depth Anything against the transformers model."""

import pytest
import torch

from tests import tiny_teachers
from visper.distillation.teachers import build_teacher, target_spec


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_teachers.save(tiny_teachers.depth_model(), tmp_path_factory.mktemp("depth"))


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


def test_original_pth_files_are_refused_with_the_id_to_take_instead():
    for ask in (build_teacher, target_spec):
        with pytest.raises(ValueError, match=r"large\.pth' is a \.pth file.*Depth-Anything-V2-Large-hf"):
            ask("depth_anything", "large.pth")
