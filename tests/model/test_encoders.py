"""Encoders of timm: any of them becomes tokens on a square grid, with its own colors, at published sizes too."""

import subprocess
import sys

import pytest
import timm
import torch
from huggingface_hub import constants
from PIL import Image
from transformers import AutoModel, ConvNextConfig, ConvNextModel, TimmWrapperConfig, TimmWrapperModel

from visper.common.errors import ConfigError
from visper.config import Geometry
from visper.config import Student as StudentConfig
from visper.model import FeatureMapTower, build_student, load_encoder, load_student, save_student
from visper.model.encoders import _normalization, _wrap

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
XXL = "timm/convnext_xxlarge.clip_laion2b_soup"
PICTURE = Image.effect_mandelbrot((20, 16), (-2, -1, 1, 1), 60).convert("RGB")


def save_timm(folder, architecture, model_args=None, **changes):
    """A random timm backbone as a local folder, with timm's own description of it."""
    torch.manual_seed(0)
    description = {**timm.get_pretrained_cfg(architecture).to_dict(), **changes}
    config = TimmWrapperConfig(architecture=architecture, pretrained_cfg=description, model_args=model_args)
    TimmWrapperModel(config).save_pretrained(folder)
    return str(folder)


SMALL_VIT = {"depth": 1, "embed_dim": 24, "num_heads": 2}
SMALL_SWIN = {"depths": [1, 1, 1, 1], "embed_dim": 12, "num_heads": [2, 2, 2, 2]}


def test_published_convnext_gives_its_grid_width_and_colors_without_weights():
    encoder = load_encoder(XXL, feature_layer=-1, image_size=768, weights=False)
    assert isinstance(encoder.model, FeatureMapTower) and all(p.is_meta for p in encoder.model.parameters())
    assert (encoder.num_tokens, encoder.model.config.hidden_size, encoder.patch_size) == (24 * 24, 3072, 32)
    assert (encoder.mean, encoder.std, encoder.select, encoder.extra_tokens) == (CLIP_MEAN, CLIP_STD, "full", 0)
    # timm lists 846,471,016 parameters with a 1000-class head.
    assert sum(p.numel() for p in encoder.model.parameters()) == 846_471_016 - (3072 * 1000 + 1000)
    with torch.no_grad():
        states = encoder.model(torch.zeros(2, 3, 768, 768, device="meta")).hidden_states
    assert [state.shape for state in states] == [(2, 576, 3072)]


def test_published_convnext_has_a_size_of_its_own():
    encoder = load_encoder(XXL, weights=False)
    assert (encoder.image_size, encoder.num_tokens) == (256, 64)


def test_published_clip_gives_its_grid_and_width_without_weights():
    encoder = load_encoder("openai/clip-vit-large-patch14-336", weights=False)
    assert (encoder.image_size, encoder.num_tokens, encoder.model.config.hidden_size) == (336, 576, 1024)
    assert (encoder.patch_size, encoder.extra_tokens, encoder.select, encoder.feature_layer) == (14, 1, "default", -2)
    assert sum(p.numel() for p in encoder.model.parameters()) == 303_507_456


def test_a_twin_without_weights_tells_what_the_loaded_encoder_tells(tiny_encoder):
    loaded, twin = (load_encoder(str(tiny_encoder), weights=weights) for weights in (True, False))
    facts = ("feature_layer", "select", "image_size", "patch_size", "num_tokens", "extra_tokens")
    assert all(getattr(loaded, fact) == getattr(twin, fact) for fact in facts)
    assert {n: p.shape for n, p in loaded.model.named_parameters()} == {
        n: p.shape for n, p in twin.model.named_parameters()
    }


@pytest.mark.parametrize(
    ("architecture", "model_args", "size", "tokens", "width"),
    [
        ("test_convnext", None, 64, 4, 64),
        ("test_efficientnet", None, 64, 4, 256),
        ("vit_tiny_patch16_224", SMALL_VIT, None, 196, 24),  # its class token is left out
        ("swin_tiny_patch4_window7_224", SMALL_SWIN, None, 49, 96),  # channels last
    ],
)
def test_any_timm_backbone_is_read_as_tokens(architecture, model_args, size, tokens, width, tmp_path):
    encoder = load_encoder(save_timm(tmp_path, architecture, model_args), image_size=size)
    pixels = torch.randn(1, 3, encoder.image_size, encoder.image_size)
    with torch.no_grad():
        found = encoder.model.eval()(pixels).hidden_states[-1]
        raw = encoder.model.backbone(pixels).last_hidden_state
    assert found.shape == (1, tokens, width) and encoder.num_tokens == tokens
    if raw.ndim == 3:
        assert torch.equal(found, raw[:, 1:])
    else:
        row, column = 0, 1  # token 1 is the second cell of the first row
        assert torch.equal(found[0, 1], raw[0, row, column] if raw.shape[-1] == width else raw[0, :, row, column])


def test_a_size_that_a_backbone_cannot_take_is_refused(tmp_path):
    vit = save_timm(tmp_path / "vit", "vit_tiny_patch16_224", SMALL_VIT)
    with pytest.raises(ValueError, match=r"does not accept images of 64 px .*use the encoder's own 224"):
        load_encoder(vit, image_size=64)
    ConvNextModel(ConvNextConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 24])).save_pretrained(tmp_path / "maps")
    with pytest.raises(ValueError, match=r"does not accept images of 8 px .*Kernel size"):
        load_encoder(str(tmp_path / "maps"), image_size=8)


def test_tokens_that_make_no_square_are_refused(tmp_path):
    folder = save_timm(tmp_path, "vit_tiny_patch16_224", SMALL_VIT)
    encoder = load_encoder(folder)
    model = encoder.model.backbone
    with pytest.raises(ValueError, match=r"makes 199 tokens from an image of 224 px, .* square"):
        _wrap(model, torch.Size([1, 200, 24]), 224, encoder.mean, encoder.std)


def test_an_architecture_that_timm_does_not_know_is_named(tmp_path):
    folder = tmp_path / "unknown"
    save_timm(folder, "test_convnext")
    (folder / "config.json").write_text((folder / "config.json").read_text().replace("test_convnext", "test_nothing"))
    with pytest.raises(ConfigError, match=r"student.encoder: cannot load .*'test_nothing' is not supported"):
        load_encoder(str(folder))


def test_a_student_on_convnext_saves_its_needs_and_loads_with_them(tmp_path, tiny_llm):
    folder = save_timm(tmp_path / "encoder", "test_convnext", mean=CLIP_MEAN, std=CLIP_STD)
    student = build_student(StudentConfig(llm=str(tiny_llm), encoder=folder, image_size=64), Geometry.SQUASH)
    assert tuple(student.processor.image_processor.image_mean) == CLIP_MEAN
    save_student(student, tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert "import visper.model" in card and "test_convnext" in card and "visper-lm[timm]" in card
    prompt = student.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}], add_generation_prompt=True
    )
    inputs = student.processor(text=prompt, images=PICTURE, return_tensors="pt", add_special_tokens=False)
    again = load_student(tmp_path)
    with torch.no_grad():
        assert torch.equal(again.model(**inputs).logits, student.model(**inputs).logits)


@pytest.mark.slow
def test_the_code_in_the_readme_loads_the_folder(tmp_path, tiny_llm):
    folder = save_timm(tmp_path / "encoder", "test_convnext")
    student = build_student(StudentConfig(llm=str(tiny_llm), encoder=folder, image_size=64), Geometry.SQUASH)
    save_student(student, tmp_path / "model")
    code = (tmp_path / "model" / "README.md").read_text().split("```")[1].removeprefix("python\n")
    subprocess.run([sys.executable, "-c", code.replace("this folder", str(tmp_path / "model"))], check=True)


def test_a_folder_that_stock_llava_holds_needs_no_such_import(tmp_path, tiny_llm, tiny_encoder):
    student = build_student(StudentConfig(llm=str(tiny_llm), encoder=str(tiny_encoder)), Geometry.SQUASH)
    save_student(student, tmp_path / "model")
    assert "import visper" not in (tmp_path / "model" / "README.md").read_text()


def test_an_encoder_without_a_processor_is_warned_about(tmp_path, caplog):
    ConvNextModel(ConvNextConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 24])).save_pretrained(tmp_path)
    load_encoder(str(tmp_path), image_size=64)
    assert "ImageNet's mean and std" in caplog.text


def test_colors_are_never_guessed_because_a_file_cannot_be_read(tmp_path, monkeypatch, caplog):
    """ImageNet's colors are for encoders known to have none; others would be trained on images of wrong colors."""
    ConvNextModel(ConvNextConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 24])).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"cannot read its preprocessor_config.json"):
        load_encoder(str(tmp_path), image_size=64)
    model = AutoModel.from_pretrained(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"unknown whether 'a/b' has the file preprocessor_config.json"):
        _normalization("a/b", model)
    assert not caplog.text
