"""Student and teacher see the pixels of the saved image processor, however it gets to their values."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, CLIPImageProcessor, EfficientNetImageProcessor

from tests import tiny
from visper.common.errors import ConfigError
from visper.data.images import build_image_processor, student_pixels
from visper.data.normalization import normalization_of
from visper.distillation.teachers import build_teacher
from visper.model import load_encoder

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8))
CHANGES = {
    "as CLIP": {},
    "not normalized": {"do_normalize": False},
    "not normalized, without mean": {"do_normalize": False, "image_mean": None, "image_std": None},
    "to -1..1": {"rescale_factor": 1 / 127.5},
    "to 0..2, not normalized": {"rescale_factor": 1 / 127.5, "do_normalize": False},
    "1/255 in single precision": {"rescale_factor": 0.003921568859368563},
    "EfficientNet": {"image_processor_type": "EfficientNetImageProcessor"},
    "EfficientNet without top": {"image_processor_type": "EfficientNetImageProcessor", "include_top": False},
    "EfficientNet with offset": {
        "image_processor_type": "EfficientNetImageProcessor",
        "include_top": False,
        "rescale_offset": True,
        "rescale_factor": 1 / 127.5,
    },
}


@pytest.fixture
def changed(tmp_path):
    """``changed(**settings)``: the folder of a tiny encoder whose image processor has these settings."""

    def change(**settings):
        folder = tiny.save_encoder(tmp_path / "encoder")
        file = folder / "preprocessor_config.json"
        content = json.loads(file.read_text()) | settings
        file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
        return folder

    return change


@pytest.mark.parametrize("name", CHANGES)
def test_student_and_teacher_see_the_pixels_of_the_saved_processor(name, changed):
    folder = changed(**CHANGES[name])
    expected = AutoImageProcessor.from_pretrained(folder)(PICTURE, return_tensors="pt", do_resize=False)["pixel_values"]
    encoder = load_encoder(str(folder))
    processor = build_image_processor("squash", encoder.image_size, encoder.mean, encoder.std)
    assert encoder.image_size == 16  # nothing is resized
    torch.testing.assert_close(student_pixels(processor, PICTURE), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(build_teacher("features", folder).see([PICTURE]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_rescale": False}, "has do_rescale=false, so it expects values between 0 and 1"),
        ({"do_flip_channel_order": True}, "has do_flip_channel_order=true, so it reads blue as red"),
        # In the class only:
        ({"image_processor_type": "MobileViTImageProcessor"}, "has do_flip_channel_order=true"),
    ],
)
def test_a_processor_that_does_more_than_normalize_is_refused(settings, message, changed):
    folder = changed(**settings)
    with pytest.raises(ConfigError, match=f"encoder '{folder}': its image processor {message}"):
        load_encoder(str(folder))
    with pytest.raises(ValueError, match=f"teacher '{folder}': its image processor {message}"):
        build_teacher("features", folder)


@pytest.mark.parametrize("kind", [CLIPImageProcessor, EfficientNetImageProcessor])
def test_what_a_file_leaves_out_is_the_default_of_its_class(kind):
    stated = normalization_of(kind().to_dict())
    assert normalization_of({"image_processor_type": kind.__name__}) == stated
    assert normalization_of({"image_processor_type": f"{kind.__name__}Fast"}) == stated


def test_an_ordinary_mean_and_standard_deviation_are_taken_bit_for_bit():
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    settings = {"image_mean": list(mean), "image_std": list(std), "rescale_factor": 0.00392156862745098}
    assert normalization_of(settings) == (mean, std)


def test_a_processor_that_normalizes_by_unknown_values_says_which():
    with pytest.raises(KeyError, match="image_mean"):
        normalization_of({"do_normalize": True})
    assert normalization_of({}, (0.1, 0.2, 0.3), (1.0, 1.0, 1.0)) == ((0.1, 0.2, 0.3), (1.0, 1.0, 1.0))
