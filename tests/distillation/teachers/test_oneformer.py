"""OneFormer against the transformers model: its last stage, and what its decoders make of it."""

import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer, OneFormerImageProcessor, OneFormerModel

from tests import tiny_teachers
from visper.distillation.teachers import build_teacher
from visper.distillation.teachers.segment_maps import Segmentation, segment_images

SIZES = [(384, 384)] * 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_teachers.save_oneformer(tmp_path_factory.mktemp("oneformer"))


@pytest.fixture(scope="module")
def teacher(folder):
    return build_teacher("oneformer", folder, size=64)


@pytest.fixture(scope="module")
def pixels():
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))


def its_own(folder, pixels, task):
    """What the transformers model itself gives, told its task in words as its processor does."""
    whole = OneFormerModel.from_pretrained(folder, is_training=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    words = tokenizer(f"the task is {task}", padding="max_length", max_length=77, truncation=True)
    ids = torch.tensor(words["input_ids"]) * torch.tensor(words["attention_mask"])
    with torch.no_grad():
        output = whole(pixels, ids.expand(len(pixels), -1))
    return whole, SimpleNamespace(
        class_queries_logits=output.transformer_decoder_class_predictions,
        masks_queries_logits=output.transformer_decoder_mask_predictions,
    )


def test_target_is_the_last_stage_row_by_row(folder, teacher, pixels):
    assert (teacher.spec.tokens, teacher.spec.width, teacher.spec.grid) == (4, 32, (2, 2))
    whole, _ = its_own(folder, pixels, "panoptic")
    with torch.no_grad():
        last = whole.pixel_level_module(pixels).encoder_features[-1]
    assert torch.equal(teacher(pixels), last.flatten(2).transpose(1, 2))
    assert torch.equal(teacher(pixels)[:, 1], last[:, :, 0, 1])


def test_its_own_target_decodes_to_the_models_own_semantic_map(folder, teacher, pixels):
    """The same tensors in the same arithmetic: equal everywhere."""
    _, output = its_own(folder, pixels, "semantic")
    maps = OneFormerImageProcessor().post_process_semantic_segmentation(output, target_sizes=SIZES)
    for found, expected in zip(teacher.segment(teacher(pixels), pixels, "semantic"), maps, strict=True):
        assert torch.equal(found.segments - 1, expected)
        assert {found.names[index] for index in found.classes.values()} <= {"cat", "tree", "sky"}


def test_its_own_target_gives_the_models_own_masks_and_classes(folder, teacher, pixels):
    """Measured 3e-7 where the largest mask logit is 0.6 and class logit 0.2."""
    found = teacher._decoded(teacher(pixels), pixels, "panoptic")
    _, expected = its_own(folder, pixels, "panoptic")
    masks, classes = found.transformer_decoder_mask_predictions, found.transformer_decoder_class_predictions
    torch.testing.assert_close(masks, expected.masks_queries_logits, rtol=0, atol=3e-6)
    torch.testing.assert_close(classes, expected.class_queries_logits, rtol=0, atol=3e-6)
    segments = OneFormerImageProcessor().post_process_panoptic_segmentation(
        expected, label_ids_to_fuse=set(), target_sizes=SIZES
    )
    ours = teacher.segment(teacher(pixels), pixels)
    for one, theirs in zip(ours, segments, strict=True):
        assert torch.equal(one.segments, theirs["segmentation"].long().clamp(min=0))


def test_confident_queries_become_named_segments(teacher, pixels, monkeypatch):
    """Random weights are sure of nothing: here one query holds the left half as a cat, another the right as sky."""
    masks = torch.full((1, 2, 16, 16), -9.0)
    masks[0, 0, :, :8], masks[0, 1, :, 8:] = 9.0, 9.0
    classes = torch.tensor([[[9.0, 0, 0, 0], [0, 0, 9.0, 0]]])
    output = SimpleNamespace(transformer_decoder_class_predictions=classes, transformer_decoder_mask_predictions=masks)
    monkeypatch.setattr(teacher, "_decoded", lambda *_: output)
    (found,) = teacher.segment(teacher(pixels)[:1], pixels[:1])
    assert found.classes == {1: 0, 2: 2} and found.names == {0: "cat", 2: "sky"}
    assert found.segments[10, 10] == 1 and found.segments[10, 370] == 2


def test_another_embedding_gives_another_picture(teacher, pixels):
    target = teacher(pixels)
    masks = [teacher._decoded(e, pixels, "semantic").transformer_decoder_mask_predictions for e in (target, -target)]
    assert (masks[0] - masks[1]).abs().max() > 1e-3


@pytest.mark.parametrize("draw", ["panoptic", "semantic"])
def test_segments_are_drawn_with_pixels_and_components_without(folder, pixels, draw):
    teacher = build_teacher("oneformer", folder, size=64, draw=draw)
    drawn = teacher.decode(teacher(pixels), pixels)
    assert drawn.shape == (2, 3, 384, 384) and drawn.min() >= 0 and drawn.max() <= 1
    assert teacher.decode(teacher(pixels)).shape == (2, 3, 2, 2)


def test_half_precision_decodes(folder, pixels):
    teacher = build_teacher("oneformer", folder, size=64).to(torch.bfloat16)
    assert teacher.decode(teacher(pixels), pixels).shape == (2, 3, 384, 384)


def test_scipy_is_not_needed(teacher, pixels, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    assert teacher.decode(teacher(pixels), pixels).shape == (2, 3, 384, 384)


def test_names_stand_on_segments_and_nothing_is_black():
    segments = torch.ones(384, 384, dtype=torch.long)
    segments[:, 192:], segments[0] = 2, 0
    picture = segment_images([Segmentation(segments, {1: 0, 2: 0}, {0: "cat"})], borders=True)[0]
    assert picture[:, 0, 20].max() == 0 and picture[:, 340, 5].max() > 0
    assert torch.equal(picture[:, 340, 5], picture[:, 340, 380])
    assert picture[:, 340, 192].max() < 0.2, "no line between two of one class"
    assert (picture[:, 180:204] > 0.9).all(0).any(), "no name in white"


def test_without_tokenizer_the_decoder_cannot_be_told_its_task(folder, tmp_path, pixels):
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("tokenizer*", "special*", "chat*"))
    teacher = build_teacher("oneformer", bare, size=64)
    with pytest.raises(ValueError, match="no tokenizer at"):
        teacher.decode(teacher(pixels), pixels)


def test_an_unknown_draw_is_refused(folder):
    with pytest.raises(ValueError, match="set it to panoptic or semantic"):
        build_teacher("oneformer", folder, draw="instance")
