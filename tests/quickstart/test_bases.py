"""The shipped bases are ordinary model folders, small, and good at what they were taught."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoTokenizer, CLIPVisionModel

from tools.quickstart_bases.encoder import to_pixels
from tools.quickstart_bases.teachers import CONFIGS
from visper.distillation.teachers import build_teacher
from visper.quickstart import BASES
from visper.quickstart.scenes import GRID, Scene, draw_scene

MEGABYTE = 1_000_000
TOWER = "visper.quickstart.tower:TowerTeacher"


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [draw_scene(55, index) for index in range(8)]


def test_all_bases_together_are_under_12_megabytes() -> None:
    assert sum(f.stat().st_size for f in BASES.rglob("*") if f.is_file()) < 12 * MEGABYTE


def test_the_llm_loads_by_the_auto_classes_and_knows_its_chat_format() -> None:
    model = AutoModelForCausalLM.from_pretrained(BASES / "llm", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(BASES / "llm")
    assert model.config.num_hidden_layers >= 4 and model.config.vocab_size == len(tokenizer)
    assert tokenizer.bos_token and tokenizer.pad_token and tokenizer.eos_token_id == model.config.eos_token_id
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "red sphere ?"}], return_tensors="pt", return_dict=False
    )
    assert torch.isfinite(model(input_ids=ids).logits).all()


def test_the_encoder_loads_with_its_image_processor(scenes: list[Scene]) -> None:
    model = CLIPVisionModel.from_pretrained(BASES / "encoder", dtype=torch.float32)
    processor = AutoImageProcessor.from_pretrained(BASES / "encoder")
    pixels = processor([Image.fromarray(s.image) for s in scenes], return_tensors="pt")["pixel_values"]
    # The image processor and the training code must agree, or the encoder sees another world than it was trained on.
    torch.testing.assert_close(pixels, to_pixels(np.stack([s.image for s in scenes])), atol=1e-5, rtol=0)
    states = model(pixels, output_hidden_states=True).hidden_states[-2]
    assert states.shape == (8, GRID * GRID + 1, model.config.hidden_size) and torch.isfinite(states).all()


@pytest.mark.parametrize("task", list(CONFIGS))
def test_each_teacher_encodes_and_decodes_scenes(task: str, scenes: list[Scene]) -> None:
    teacher = build_teacher(TOWER, BASES / f"teacher_{task}")
    pixels = teacher.see([Image.fromarray(s.image) for s in scenes])
    target = teacher(pixels)
    images = teacher.decode(target)
    assert images.shape == (8, 3, 96, 96) and images.min() >= 0 and images.max() <= 1
    # Standardized tokens: smooth-L1 losses of all teachers then have one scale.
    assert 0.5 < target.std() < 2


def test_the_depth_and_segmentation_teachers_see(scenes: list[Scene]) -> None:
    depth, seg = (build_teacher(TOWER, BASES / f"teacher_{task}") for task in ("depth", "seg"))
    pixels = depth.see([Image.fromarray(s.image) for s in scenes])
    wanted = torch.from_numpy(np.stack([s.depth for s in scenes]))
    error = (depth.decode_values(depth(pixels))[:, 0] / wanted - 1).abs().mean()
    classes = torch.from_numpy(np.stack([s.classes for s in scenes]).astype(np.int64))
    right = (seg.decode_values(seg(pixels)).argmax(1) == classes).float().mean()
    assert error < 0.2 and right > 0.88


def test_the_quality_of_every_part_is_on_record() -> None:
    quality = json.loads((BASES / "quality.json").read_text())
    assert set(quality) == {"encoder", "llm", *(f"teacher_{task}" for task in CONFIGS)}
