"""What the teachers from transformers share: their colours, whole weights, and why one cannot be loaded."""

import shutil
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForDepthEstimation, DepthAnythingForDepthEstimation, PreTrainedModel

from tests import tiny_teachers
from visper.distillation.teachers import build_teacher, target_spec


@pytest.fixture(scope="module")
def depth_folder(tmp_path_factory):
    return tiny_teachers.save(tiny_teachers.depth_model(), tmp_path_factory.mktemp("depth"))


@pytest.fixture(scope="module")
def oneformer_folder(tmp_path_factory):
    return tiny_teachers.save_oneformer(tmp_path_factory.mktemp("oneformer"))


@pytest.fixture(scope="module")
def unclip_folder(tmp_path_factory):
    return tiny_teachers.save_unclip(tmp_path_factory.mktemp("unclip"))


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


def test_no_processor_of_the_hub_is_needed_for_the_colours(oneformer_folder, tmp_path):
    """OneFormer's own image processor fetches its classes' names from another repository when it is built."""
    folder = tmp_path / "published"
    shutil.copytree(oneformer_folder, folder)
    (folder / "preprocessor_config.json").write_text(
        '{"image_processor_type": "OneFormerImageProcessor", "image_mean": [0.4, 0.5, 0.6], "image_std": [1, 1, 1],'
        ' "class_info_file": "coco_panoptic.json", "repo_path": "shi-labs/oneformer_demo"}'
    )
    assert build_teacher("oneformer", folder, size=64).preprocess.mean == (0.4, 0.5, 0.6)


def test_an_id_out_of_reach_says_how_to_fetch_it(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for kind in ("depth_anything", "oneformer", "unclip", "features"):
        with pytest.raises(ValueError, match=r"Without network: `hf download nobody/nothing`"):
            build_teacher(kind, "nobody/nothing")


def test_a_folder_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"'/nowhere/teacher'.*Give a folder that exists"):
        build_teacher("features", "/nowhere/teacher")


@pytest.mark.parametrize("kind", ["depth_anything", "oneformer", "unclip", "features"])
@pytest.mark.parametrize(
    ("cause", "message"),
    [
        (GatedRepoError, r"it is gated.*https://huggingface.co/some/teacher, then `hf auth login`"),
        (RepositoryNotFoundError, "no such model, or it is private"),
    ],
)
def test_a_refusal_of_the_hub_says_what_to_do(kind, cause, message, monkeypatch):
    def refuse(*args, **kwargs):
        error = OSError("You are trying to access ...")
        raise error from cause("401", response=SimpleNamespace(headers={}, request=None))

    for loader in (AutoConfig, PreTrainedModel, AutoModelForDepthEstimation):
        monkeypatch.setattr(loader, "from_pretrained", refuse)
    with pytest.raises(ValueError, match=message):
        build_teacher(kind, "some/teacher")


@pytest.mark.parametrize(
    ("kind", "folder", "options"),
    [
        ("depth_anything", "depth_folder", {"size": 56}),
        ("oneformer", "oneformer_folder", {"size": 64}),
        ("unclip", "unclip_folder", {"subfolder": "image_encoder"}),
    ],
)
def test_the_planned_shape_is_the_loaded_one(kind, folder, options, request):
    place = request.getfixturevalue(folder)
    assert target_spec(kind, place, **options) == build_teacher(kind, place, **options).spec
