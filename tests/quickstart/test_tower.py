"""Tower teachers: shapes, folders, errors."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from visper.distillation.teachers import build_teacher
from visper.quickstart.tower import TowerConfig, TowerModel, TowerTeacher, class_images, nearness_images

SMALL = {"image_size": 24, "width": 5, "inner": 16}


def saved(folder: Path, **options: object) -> TowerTeacher:
    torch.manual_seed(0)
    TowerModel(TowerConfig(**{**SMALL, **options})).save_pretrained(folder)
    teacher = build_teacher("visper.quickstart.tower:TowerTeacher", folder)
    assert isinstance(teacher, TowerTeacher)
    return teacher


@pytest.mark.parametrize(
    ("head", "grid", "outputs", "shape"), [("depth", 2, 1, (4, 5)), ("classes", 2, 6, (4, 5)), ("image", 1, 3, (1, 5))]
)
def test_encode_gives_what_the_spec_says_and_decode_an_image(
    tmp_path: Path, head: str, grid: int, outputs: int, shape: tuple[int, int]
) -> None:
    teacher = saved(tmp_path, head=head, grid=grid, outputs=outputs)
    pixels = teacher.see([Image.new("RGB", (50, 30), color) for color in ("red", "blue", "white")])
    embedding = teacher(pixels)
    assert embedding.shape == (3, *shape) == (3, teacher.spec.tokens, teacher.spec.width)
    assert teacher.decode_values(embedding).shape == (3, outputs, 24, 24)
    images = teacher.decode(embedding)
    assert images.shape == (3, 3, 24, 24) and images.min() >= 0 and images.max() <= 1
    half = teacher.to(torch.bfloat16)  # as on a GPU
    torch.testing.assert_close(half.decode(half(pixels)), images, rtol=0, atol=1.0 if head == "classes" else 0.1)


def test_a_saved_teacher_answers_identically(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = TowerModel(TowerConfig(**SMALL, grid=2)).eval()
    model.save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 24, 24)
    assert torch.equal(TowerTeacher(tmp_path)(pixels), model.encode(pixels))


def test_decoded_depth_stays_between_near_and_far(tmp_path: Path) -> None:
    teacher = saved(tmp_path, grid=2, near=2.0, far=30.0)
    depth = teacher.decode_values(100 * torch.randn(2, 4, 5))
    assert depth.min() >= 2.0 and depth.max() <= 30.0001


def test_a_teacher_is_frozen(tmp_path: Path) -> None:
    teacher = saved(tmp_path, grid=2)
    assert not any(p.requires_grad for p in teacher.parameters()) and not teacher.train().training


def test_unknown_heads_and_grids_are_refused() -> None:
    with pytest.raises(ValueError, match="expected one of depth, classes, image"):
        TowerModel(TowerConfig(head="normals"))
    with pytest.raises(ValueError, match="a grid of 8, or 1"):
        TowerModel(TowerConfig(grid=4))


def test_near_is_white_and_classes_have_their_colors() -> None:
    gray = nearness_images(torch.tensor([2.0, 30.0]).view(1, 1, 1, 2), 2.0, 30.0)
    torch.testing.assert_close(gray[0, 0, 0], torch.tensor([1.0, 0.0]))
    assert class_images(torch.tensor([[[0, 1]]])).shape == (1, 3, 1, 2)
