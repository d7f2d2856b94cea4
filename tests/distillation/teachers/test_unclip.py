"""unCLIP's image encoder against the transformers model, and what draws its embedding."""

import sys

import pytest
import torch
from transformers import CLIPVisionModelWithProjection

from tests import tiny_teachers
from visper.distillation.teachers import build_teacher, unclip
from visper.distillation.teachers.unclip import nearest


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_teachers.save_unclip(tmp_path_factory.mktemp("unclip"))


def test_target_is_the_projected_image_embedding(folder):
    teacher = build_teacher("unclip", folder, subfolder="image_encoder")
    assert (teacher.spec.tokens, teacher.spec.width, teacher.spec.grid) == (1, 6, None)
    pixels = torch.rand(2, 3, 28, 28)
    whole = CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder").eval()
    with torch.no_grad():
        assert torch.equal(teacher(pixels)[:, 0], whole(pixels).image_embeds)


def test_without_diffusion_there_is_no_picture_of_its_own(folder):
    """The rest of the pipeline is not even there, and diffusers is not imported."""
    loaded = "diffusers" in sys.modules
    teacher = build_teacher("unclip", folder, subfolder="image_encoder")
    assert not teacher.draws_images
    with pytest.raises(ValueError, match="without positions"):
        teacher.decode(teacher(torch.rand(2, 3, 28, 28)))
    assert ("diffusers" in sys.modules) == loaded


def test_the_pipeline_draws_the_embedding_as_it_draws_the_image(tmp_path):
    """The picture of a target is the one the whole pipeline makes of the image itself, from the same noise."""
    diffusers = pytest.importorskip("diffusers")
    folder = tiny_teachers.save_diffusion(tmp_path / "pipeline")
    teacher = build_teacher("unclip", folder, subfolder="image_encoder", draw="diffusion", steps=2)
    assert teacher.draws_images
    pixels = torch.rand(1, 3, 28, 28)
    drawn = teacher.decode(teacher(pixels))
    pipeline = diffusers.StableUnCLIPImg2ImgPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(0)
    theirs = pipeline(pixels, "", num_inference_steps=2, generator=noise, output_type="pt").images
    torch.testing.assert_close(drawn, theirs, rtol=0, atol=1e-6)
    other = teacher.decode(-teacher(pixels))
    assert other.shape == drawn.shape and not torch.equal(other, drawn)


def test_diffusion_without_its_package_names_the_extra(folder, monkeypatch):
    monkeypatch.setattr(unclip, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs the package 'diffusers'.*pip install 'visper-lm\[diffusion\]'"):
        build_teacher("unclip", folder, subfolder="image_encoder", draw="diffusion")


def test_nearest_is_by_cosine_best_first():
    gallery = torch.tensor([[[1.0, 0.0]], [[0.0, 3.0]], [[1.0, 1.0]]])
    found = nearest(torch.tensor([[[0.1, 5.0]], [[9.0, 8.0]]]), gallery, count=2)
    assert found.tolist() == [[1, 2], [2, 0]]
    assert nearest(gallery, gallery, count=9).shape == (3, 3)
