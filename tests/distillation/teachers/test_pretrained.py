"""What the teachers from transformers share: their colors, whole weights, and why one cannot be loaded."""

import json
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
from visper.config import load_run
from visper.distillation import check_head_fits
from visper.distillation.teachers import build_teacher, target_spec
from visper.model.hub import sizes_of


@pytest.fixture(scope="module")
def depth_folder(tmp_path_factory):
    return tiny_teachers.save(tiny_teachers.depth_model(), tmp_path_factory.mktemp("depth"))


@pytest.fixture(scope="module")
def oneformer_folder(tmp_path_factory):
    return tiny_teachers.save_oneformer(tmp_path_factory.mktemp("oneformer"))


@pytest.fixture(scope="module")
def unclip_folder(tmp_path_factory):
    return tiny_teachers.save_unclip(tmp_path_factory.mktemp("unclip"))


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory):
    return tiny_teachers.save_vision(tmp_path_factory.mktemp("dino"), "dinov3_vit", num_register_tokens=2)


TINY = pytest.mark.parametrize(
    ("kind", "folder", "options"),
    [
        ("depth_anything", "depth_folder", {"size": 56}),
        ("oneformer", "oneformer_folder", {"size": 64}),
        ("unclip", "unclip_folder", {"subfolder": "image_encoder"}),
        ("features", "dino_folder", {"size": 42}),
    ],
)
"""Each kind with a tiny model of it."""


@TINY
def test_images_are_normalized_as_the_model_was_trained(kind, folder, options, request):
    teacher = build_teacher(kind, request.getfixturevalue(folder), **options)
    (pixels,) = teacher.see([Image.new("RGB", (30, 20), (255, 0, 0))])
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
    with pytest.raises(ValueError, match=r"lacks 1 weight of CLIPVisionModelWithProjection, such as 'visual_proj"):
        build_teacher("unclip", folder, subfolder="image_encoder")


def test_no_processor_of_the_hub_is_needed_for_the_colors(oneformer_folder, tmp_path):
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
        with pytest.raises(ValueError, match=r"Without network: run `hf download nobody/nothing`"):
            build_teacher(kind, "nobody/nothing")


def test_a_folder_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"'/nowhere/teacher'.*Use an existing folder"):
        build_teacher("features", "/nowhere/teacher")


@pytest.mark.parametrize("kind", ["depth_anything", "oneformer", "unclip", "features"])
@pytest.mark.parametrize(
    ("cause", "message"),
    [
        (GatedRepoError, r"it is gated.*https://huggingface.co/some/teacher, then run `hf auth login`"),
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


@TINY
def test_the_planned_shape_is_the_loaded_one(kind, folder, options, request):
    place = request.getfixturevalue(folder)
    assert target_spec(kind, place, **options) == build_teacher(kind, place, **options).spec


@TINY
def test_a_batch_gives_what_its_images_give_one_by_one(kind, folder, options, request):
    """Measured: at most 8e-8 of the largest value."""
    teacher = build_teacher(kind, request.getfixturevalue(folder), **options)
    side = teacher.preprocess.size[0]
    pixels = torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(1))
    together = teacher(pixels)
    alone = torch.cat([teacher(one[None]) for one in pixels])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6 * float(alone.abs().max()))
    assert (together[0] - together[1]).abs().max() > 1e-3, "the images must matter"


@TINY
def test_half_precision_gives_the_same_target_coarsely(kind, folder, options, request):
    """Measured: apart by 0.4 to 0.8 % of the target's norm, as bfloat16's 8 bits let expect."""
    teacher = build_teacher(kind, request.getfixturevalue(folder), **options)
    side = teacher.preprocess.size[0]
    pixels = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    exact = teacher(pixels)
    coarse = teacher.to(torch.bfloat16)(pixels)
    assert coarse.dtype == torch.bfloat16
    assert (coarse.float() - exact).norm() < 0.02 * exact.norm()


@TINY
def test_nothing_of_a_teacher_learns(kind, folder, options, request):
    teacher = build_teacher(kind, request.getfixturevalue(folder), **options).train()
    assert not teacher.training and not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    side = teacher.preprocess.size[0]
    assert not teacher(torch.rand(1, 3, side, side, requires_grad=True)).requires_grad


def test_published_sizes_are_the_defaults(depth_folder, oneformer_folder):
    """24 x 24 cells each: 336 pixels in patches of 14, 768 at a stride of 32; 224 is what CLIP-H itself says."""
    depth, seg = build_teacher("depth_anything", depth_folder), build_teacher("oneformer", oneformer_folder)
    picture = Image.new("RGB", (50, 20), (9, 200, 30))
    assert depth.see([picture]).shape == (1, 3, 336, 336) and depth.spec.grid == (24, 24)
    assert seg.see([picture]).shape == (1, 3, 768, 768) and seg.spec.grid == (24, 24)
    assert sizes_of("sd2-community/stable-diffusion-2-1-unclip", "gen", "image_encoder").image_size == 224


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("llama3-8b-vit-l/pt", {"depth": (576, 1024), "seg": (576, 1536), "gen": (1, 1024)}),
        ("llama3-8b-vit-l/pt-dinov2-siglip2", {"dino": (576, 1024), "siglip": (576, 1024)}),
    ],
)
def test_recipes_plan_the_published_targets(recipe, expected):
    distillation = load_run(recipe).distillation
    planned = {}
    for task, settings in distillation.tasks.items():
        spec = target_spec(settings.target.kind, settings.target.model, **settings.target.options)
        planned[task] = (spec.tokens, spec.width)
        check_head_fits(task, settings.head, spec, settings.at, 8)
    assert planned == expected


def test_code_of_a_models_own_is_not_run_unasked(dino_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "own"
    shutil.copytree(dino_folder, folder)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "unheard_of"}
    config["auto_map"] = {"AutoConfig": "theirs.Config", "AutoModel": "theirs.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "theirs.py").write_text("raise RuntimeError('run')")
    with pytest.raises(ValueError, match="trust_remote_code"):
        build_teacher("features", folder)
    with pytest.raises(ValueError, match=r"own': run"):
        build_teacher("features", folder, trust_remote_code=True)
