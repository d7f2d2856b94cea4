import importlib
import inspect
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.tiny import PooledColors
from visper.config.kinds import TEACHERS
from visper.data.images import rgb_bytes
from visper.distillation.teachers import SquashedImage, TargetSpec, Teacher, build_teacher, pca_images


class Constant(Teacher):
    """The smallest teacher there can be."""

    def __init__(self, model, width=3):
        super().__init__()
        self.spec = TargetSpec(4, 3, (2, 2))
        self.preprocess = SquashedImage((2, 2))
        self.layer = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, width))
        self.freeze()

    def encode(self, pixels):
        return self.layer(pixels.flatten(2).transpose(1, 2))


HERE = f"{__name__}:Constant"


def test_a_teacher_is_frozen_and_stays_in_evaluation_mode():
    teacher = build_teacher(HERE, "x")
    nn.Sequential(teacher).train()
    assert not teacher.training and not teacher.layer[0].training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    pixels = torch.rand(2, 3, 2, 2, requires_grad=True)
    assert not teacher(pixels).requires_grad
    assert torch.equal(teacher(pixels), teacher(pixels))


def test_targets_that_break_the_spec_are_refused():
    with pytest.raises(ValueError, match=r"gave targets of shape \(1, 4, 5\), but its spec says \(1, 4, 3\)"):
        build_teacher(HERE, "x", width=5)(torch.rand(1, 3, 2, 2))


def test_an_unknown_kind_names_the_nearest():
    with pytest.raises(ValueError, match="unknown target 'depth_anythin': did you mean 'depth_anything'"):
        build_teacher("depth_anythin", "x")
    with pytest.raises(ValueError, match="expected one of onnx, depth_anything"):
        build_teacher("qqq", "x")


def test_a_class_that_is_no_teacher_is_refused():
    with pytest.raises(ValueError, match=r"torch.nn:Identity, expected a subclass of .*teachers\.Teacher"):
        build_teacher("torch.nn:Identity", "x")


def test_an_unknown_option_is_named():
    with pytest.raises(ValueError, match=r"'sise'.*did you mean 'size'"):
        build_teacher("depth_anything", "x", sise=3)


def test_a_missing_package_names_its_extra(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime")

    monkeypatch.setattr("visper.common.importing.import_module", absent)
    with pytest.raises(ImportError, match=r"needs the package 'onnxruntime'.*pip install 'visper-lm\[onnx\]'"):
        build_teacher("onnx", "x")


def test_every_kind_of_the_table_names_a_teacher():
    for kind in TEACHERS.values():
        module, name = kind.place.split(":")
        teacher = getattr(importlib.import_module(module), name)
        assert issubclass(teacher, Teacher)
        assert list(inspect.signature(teacher).parameters) == ["model", *kind.options]


def test_preprocessing_squashes_and_keeps_the_channel_order():
    """FAULT of the published code: its depth teacher sees blue for red."""
    image = Image.fromarray(np.full((5, 9, 3), (255, 0, 51), np.uint8))
    preprocess = SquashedImage((2, 4), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    sent = preprocess(rgb_bytes(image))
    assert sent.shape == (3, 2, 4) and sent.dtype == torch.uint8, "a quarter of the bytes"
    (pixels,) = preprocess.normalize(sent[None])
    assert pixels.shape == (3, 2, 4) and pixels.dtype == torch.float32
    torch.testing.assert_close(pixels[:, 0, 0], torch.tensor([1.0, -1.0, -0.6]))


def test_preprocessing_travels_to_workers_without_weights():
    preprocess = build_teacher(HERE, "x").preprocess
    assert pickle.loads(pickle.dumps(preprocess)) == preprocess
    assert len(pickle.dumps(preprocess)) < 500


def test_spec_refuses_a_grid_of_another_size():
    with pytest.raises(ValueError, match="4 tokens cannot lie on a grid of 3 x 2"):
        TargetSpec(4, 3, (3, 2))


@pytest.mark.parametrize("width", [1, 2, 3, 10])
def test_principal_components_are_images(width):
    images = pca_images(torch.randn(2, 6, width), (2, 3))
    assert images.shape == (2, 3, 2, 3)
    assert images.min() >= 0 and images.max() <= 1


def test_principal_components_stay_float32_under_autocast():
    values = torch.randn(2, 6, 10)
    expected = pca_images(values, (2, 3))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pca_images(values, (2, 3)), expected)


def test_a_teacher_that_holds_its_weights_as_buffers_gets_images_in_their_precision():
    teacher = PooledColors("colors").to(torch.bfloat16)
    pixels = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    assert teacher(pixels).dtype == torch.bfloat16


def test_a_teacher_with_quantized_weights_gets_images_that_are_not_rounded():
    class Quantized(PooledColors):
        def __init__(self, model):
            super().__init__(model)
            integers = torch.nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
            self.register_parameter("integers", integers)

        def encode(self, pixels):
            assert pixels.is_floating_point()
            return super().encode(pixels)

    pixels = torch.rand(2, 3, 16, 16)
    assert torch.equal(Quantized("colors")(pixels), PooledColors("colors")(pixels))


def test_a_prediction_can_be_drawn_in_its_teachers_colors():
    target = torch.randn(2, 6, 5)
    torch.testing.assert_close(pca_images(target[:1], (2, 3), reference=target), pca_images(target, (2, 3))[:1])


def test_an_embedding_is_drawn_on_its_grid():
    teacher = build_teacher(HERE, "x")
    assert teacher.draws_images and teacher.decode(torch.rand(2, 4, 3)).shape == (2, 3, 2, 2)


@pytest.mark.parametrize("spec", [TargetSpec(1, 10), TargetSpec(1, 10, (1, 1)), TargetSpec(4, 3)])
def test_a_target_without_positions_is_not_drawn_as_a_map(spec):
    teacher = build_teacher(HERE, "x")
    teacher.spec = spec
    assert not teacher.draws_images
    with pytest.raises(ValueError, match=f"target of {spec.tokens} x {spec.width} without positions"):
        teacher.decode(torch.rand(2, spec.tokens, spec.width))
