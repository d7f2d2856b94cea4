"""Families beyond those of ``tests.vlms``: the loss, and the places of image tokens where a rule gives them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from PIL import Image

from tests.distillation.vlms import MODELS, PATCHES, QWEN_VISION, ROPE, TEXT, VISION, WIDTH
from tests.training.test_vlm_students import batch_of, changes_by_distance, image_of, question, run_of
from tests.vlms import CHATML, IDS, PROCESSORS, qwen_processor, save_made, tokenizer_with
from visper.common.errors import ConfigError
from visper.config import VlmStudent
from visper.data.vlm import ModelInputs, encoder_for
from visper.model.vlm import build_vlm, limit_pixels
from visper.training.module import TrainingModel
from visper.training.run import run_stage

Made = tuple[Any, Any, dict[str, str]]
PADS = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
PADS |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
MARKS = ["<|im_start|>", "<|im_end|>"]
LLAMA = {"model_type": "llama", **TEXT}


def qwen2_vl() -> Made:
    vision = {**QWEN_VISION, "embed_dim": 32, "mlp_ratio": 2, "hidden_size": WIDTH}
    config = t.Qwen2VLConfig(vision_config=vision, text_config={**TEXT, **ROPE})
    return config, qwen_processor(t.Qwen2VLProcessor, t.Qwen2VLVideoProcessor), PADS


def glm4v() -> Made:
    ids = {"image_token_id": "<|image|>", "image_start_token_id": "<|begin_of_image|>"}
    ids |= {"image_end_token_id": "<|end_of_image|>"}
    images = t.Glm4vImageProcessor(patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 2048})
    processor = t.Glm4vProcessor(
        images,
        tokenizer_with([*MARKS, *ids.values(), "<|video|>"]),
        t.Glm4vVideoProcessor(),
        chat_template=CHATML.replace("IMAGE", "<|begin_of_image|><|image|><|end_of_image|>"),
    )
    return t.Glm4vConfig(vision_config={**QWEN_VISION, "image_size": 16}, text_config={**TEXT, **ROPE}), processor, ids


def idefics3() -> Made:
    cells = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    marks = ["<fake_token_around_image>", "<global-img>", "<image>", "<end_of_utterance>"]
    processor = t.Idefics3Processor(
        t.Idefics3ImageProcessor(size={"longest_edge": 32}, max_image_size={"longest_edge": 16}),
        tokenizer_with([*MARKS, *marks, *cells]),
        image_seq_len=4,
        chat_template=CHATML.replace("IMAGE", "<image>"),
    )
    config = t.Idefics3Config(vision_config={**VISION, **PATCHES}, text_config=LLAMA, scale_factor=2)
    return config, processor, {"image_token_id": "<image>"}


def llava_next() -> Made:
    sizes = [[16, 32], [32, 16], [32, 32]]
    processor = t.LlavaNextProcessor(
        t.LlavaNextImageProcessor(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_grid_pinpoints=sizes
        ),
        tokenizer_with([*MARKS, "<image>"]),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHATML.replace("IMAGE", "<image>\n"),
    )
    vision = {"model_type": "clip_vision_model", **VISION, **PATCHES}
    config = t.LlavaNextConfig(
        vision_config=vision, text_config=LLAMA, image_grid_pinpoints=sizes, vision_feature_layer=-1
    )
    return config, processor, {"image_token_id": "<image>"}


def aya_vision() -> Made:
    marks = ["<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "TILE_GLOBAL", "TILE_1", "TILE_2"]
    processor = t.AyaVisionProcessor(
        t.GotOcr2ImageProcessor(size={"height": 16, "width": 16}, max_patches=2),
        tokenizer_with([*MARKS, *marks]),
        patch_size=4,
        img_size=16,
        downsample_factor=2,
        chat_template=CHATML.replace("IMAGE", "<image>"),
    )
    vision = {"model_type": "siglip_vision_model", **VISION, **PATCHES, "vision_use_head": False}
    config = t.AyaVisionConfig(vision_config=vision, text_config={"model_type": "cohere2", **TEXT})
    return config, processor, {"image_token_id": "<|IMG_PATCH|>"}


def qwen3_vl_moe() -> Made:
    text = {**TEXT, **ROPE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    vision = {**QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    config = t.Qwen3VLMoeConfig(vision_config=vision, text_config=text)
    return config, qwen_processor(t.Qwen3VLProcessor, t.Qwen3VLVideoProcessor), PADS


def lfm2_vl() -> Made:
    cells = [f"<|img_row_{row}_col_{column}|>" for row in (1, 2, 3) for column in (1, 2, 3)]
    marks = ["<image>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>"]
    sizes = {"encoder_patch_size": 4, "tile_size": 16, "max_image_tokens": 16, "min_image_tokens": 4}
    processor = t.Lfm2VlProcessor(
        t.Lfm2VlImageProcessor(**sizes, max_num_patches=64),
        tokenizer_with([*MARKS, *marks, *cells]),
        chat_template=CHATML.replace("IMAGE", "<image>"),
    )
    vision = {"model_type": "siglip2_vision_model", **VISION, "patch_size": 4, "num_patches": 64}
    text = {"model_type": "lfm2", **TEXT, "layer_types": ["conv", "full_attention", "conv"]}
    del text["head_dim"]
    config = t.Lfm2VlConfig(vision_config={**vision, "vision_use_head": False}, text_config=text)
    return config, processor, {"image_token_id": "<image>"}


def paligemma() -> Made:
    images = t.SiglipImageProcessor(size={"height": 16, "width": 16})
    images.image_seq_length = 16
    tokenizer = tokenizer_with(MARKS, {"image_token": "<image>"})
    processor = t.PaliGemmaProcessor(images, tokenizer, chat_template=CHATML.replace("IMAGE", "<image>"))
    vision = {"model_type": "siglip_vision_model", **VISION, **PATCHES, "vision_use_head": False}
    config = t.PaliGemmaConfig(vision_config=vision, text_config={"model_type": "gemma", **TEXT}, projection_dim=WIDTH)
    return config, processor, {"image_token_id": "<image>"}


def gemma4() -> Made:
    made: Any = MODELS["gemma4"][0]()
    return made.config, PROCESSORS["gemma4"](), IDS["gemma4"]


PLACED: tuple[Callable[[], Made], ...] = (qwen2_vl, qwen3_vl_moe, glm4v, idefics3, gemma4)
NOT_PLACED: tuple[Callable[[], Made], ...] = (llava_next, aya_vision, lfm2_vl)


def test_a_processor_that_is_called_in_another_way_is_refused_not_its_image():
    tokenizer = tokenizer_with([*MARKS, "<img>", "</img>", "<imgpad>"])
    images = t.GotOcr2ImageProcessor(size={"height": 16, "width": 16})
    with pytest.raises(ConfigError, match=r"GotOcr2Processor .* this model is not supported \(Nested images are only"):
        encoder_for(t.GotOcr2Processor(images, tokenizer, chat_template=CHATML.replace("IMAGE", "<imgpad>")))


@pytest.mark.parametrize("made", [qwen2_vl, glm4v], ids=lambda made: made.__name__)
def test_max_pixels_is_an_images_area(made):
    processor = made()[1]
    for limit, expected in ((512, 384), (4096, 3456)):  # cells of 8 x 8 pixels
        limit_pixels(processor, limit)
        (grid,) = processor.image_processor([Image.new("RGB", (200, 150))], return_tensors="pt")["image_grid_thw"]
        assert int(grid.prod()) * 16 == expected


def test_gemma_4_has_the_most_tokens_that_max_pixels_allows():
    processor = gemma4()[1]
    for limit, expected in ((1120, 70), (9000, 560), (99999, 1120)):  # tokens of 4 x 4 pixels
        limit_pixels(processor, limit)
        assert processor.image_processor.max_soft_tokens == expected
        made = processor.image_processor([Image.new("RGB", (200, 150))], return_tensors="pt")
        assert 0.85 * expected < int(made["num_soft_tokens_per_image"][0]) <= expected
    with pytest.raises(ConfigError, match="at least 1120 pixels"):
        limit_pixels(processor, 1119)


@pytest.fixture(scope="module")
def student(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = save_made(tmp_path_factory.mktemp(request.param.__name__), *request.param())
    return build_vlm(VlmStudent(vlm=str(folder)))


@pytest.mark.parametrize("student", [*PLACED, *NOT_PLACED], indirect=True, ids=lambda made: made.__name__)
def test_the_loss_is_the_models_own(student, tmp_path):
    for name, size in {"wide": (40, 24), "tall": (20, 50)}.items():
        Image.fromarray(image_of(*size).numpy()).save(tmp_path / f"{name}.png")
    wide, tall = tmp_path / "wide.png", tmp_path / "tall.png"
    rows = [question("what?", "a thing", wide), question("say", "words"), question("this,that?", "both", tall, wide)]
    batch = batch_of(student, rows)
    shared = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
    own = student.model(**shared, **batch["model_inputs"]).loss
    supervised = (batch["labels"][:, 1:] != -100).sum()
    more = {key: batch[key] for key in ("model_inputs", "image_rows")}
    loss = TrainingModel(student).eval()(**shared, **more, num_tokens=supervised)["loss"]
    assert torch.allclose(loss, own, rtol=3e-7, atol=0)  # as in test_vlm_students


@pytest.mark.parametrize("student", PLACED, indirect=True, ids=lambda made: made.__name__)
@pytest.mark.parametrize("size", [(64, 32), (48, 64)])
def test_an_image_token_lies_where_its_feature_changes_with_the_image(student, size):
    """Attention in the encoder, which mixes places, is turned off: only the tokens of the changed place may change."""
    language = {id(module) for module in student.model.get_decoder().modules()}
    for module in student.model.modules():
        if type(module).__name__.endswith("Attention") and id(module) not in language:
            module.register_forward_hook(
                lambda _, __, out: (out[0] * 0, *out[1:]) if isinstance(out, tuple) else out * 0
            )
    for change, distance in changes_by_distance(student, size):
        # Half the changed quarter and half a token, of at most half the image.
        assert distance[change > change.max() / 3].max() <= 0.125 + 0.25


@pytest.mark.parametrize("student", NOT_PLACED, indirect=True, ids=lambda made: made.__name__)
def test_a_family_that_orders_its_tiles_in_another_way_has_no_places(student):
    assert not student.knows_places
    inputs, images = ModelInputs(student.processor, student.image_token_id), [[Image.new("RGB", (40, 24))]]
    assert inputs.places(images, [16], inputs.images(images)) is None


def test_a_processor_that_makes_tensors_from_the_text_is_refused(tmp_path):
    vlm = save_made(tmp_path / "vlm", *paligemma())
    with pytest.raises(ConfigError, match="PaliGemmaProcessor makes 'labels' from the text of a row"):
        run_stage(run_of(tmp_path, Path(vlm), "ift"))
