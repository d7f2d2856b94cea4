"""Model FLOPs and MFU: one definition, held against counts by hand."""

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from visper.common.compat import around_operations, sees_around_compiled
from visper.config import Geometry, Stage
from visper.config import Student as StudentConfig
from visper.data.collator import Collator, Sample
from visper.data.packing import PackingCollator
from visper.model import build_student
from visper.training.attention import separate_samples
from visper.training.flops import FlopMeter, can_count, known_peak
from visper.training.module import FORWARD_KEYS, TrainingModel
from visper.training.stages import TASK_TOKEN_PARTS, apply_stage

TOKENS, LAYERS, WIDTH, KEYS, INNER = (30, 21), 4, 32, 16, 64
PATCHES, VISION, VISION_INNER, VISION_LAYERS = 16, 24, 48, 3


def by_hand(words: int, supervised: int, frozen: bool) -> float:
    """Two rows, the first with an image: products of [m, k] x [k, n] are 2 m k n FLOPs."""
    layer = 2 * WIDTH * WIDTH + 2 * WIDTH * KEYS + 3 * WIDTH * INNER
    llm = 2 * (2 if frozen else 3) * LAYERS * layer * sum(TOKENS)
    attention = 3 * 4 * WIDTH * LAYERS * sum(n**2 for n in TOKENS)
    head = 2 * (2 if frozen else 3) * WIDTH * words * supervised
    places = PATCHES + 1  # and the class token
    block = places * (4 * VISION**2 + 2 * VISION * VISION_INNER) + 2 * VISION * places**2
    encoder = 2 * (PATCHES * 3 * 4 * 4 * VISION + VISION_LAYERS * block)
    projector = 2 * PATCHES * (2 * VISION * WIDTH + 3 * WIDTH * WIDTH)  # its input needs no gradient
    return float(llm + attention + head + encoder + projector)


@pytest.fixture
def model(tiny_llm, tiny_encoder):
    student = build_student(StudentConfig(llm=str(tiny_llm), encoder=str(tiny_encoder)), Geometry.SQUASH)
    model = TrainingModel(student)
    apply_stage(model, Stage.IFT, TASK_TOKEN_PARTS)
    return model.train()


def batch_of(model, packed):
    rows = []
    for number, tokens in enumerate(TOKENS):
        block = [model.image_token_id] * PATCHES if number == 0 else []
        ids = [5, *block, *[7] * (tokens - 1 - len(block))]
        pixels = torch.zeros(1, 3, 16, 16) if block else None
        rows.append(Sample(str(number), ids, [-100] * (tokens - 3) + [7] * 3, (PATCHES,) if block else (), pixels))
    return (PackingCollator(Collator(0)) if packed else Collator(0))(rows)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("recomputed", [0.0, 1.0])
@pytest.mark.parametrize("frozen", [False, True])
def test_flops_are_those_counted_by_hand(model, packed, recomputed, frozen):
    """Padding and recomputation change nothing; a frozen LLM has gradients of its inputs only."""
    if frozen:
        model.student.get_decoder().requires_grad_(False)
        model.student.get_output_embeddings().requires_grad_(False)
    if packed:
        separate_samples(model.student.get_decoder())
    if recomputed:
        model.recompute_activations(recomputed)
    batch, meter = batch_of(model, packed), FlopMeter()
    sizes = batch["sizes"]
    with meter.watch(model, batch["input_ids"].numel(), sizes):
        model(**{name: batch[name] for name in FORWARD_KEYS & batch.keys()}, num_tokens=sizes.supervised)
    found = meter.costs.flops(sizes.tokens, sizes.pairs, sizes.supervised, sizes.image_tokens)
    assert found == by_hand(model.student.get_output_embeddings().out_features, 6, frozen)
    layer = 2 * WIDTH * WIDTH + 2 * WIDTH * KEYS + 3 * WIDTH * INNER
    again = 2 * LAYERS * layer * sum(TOKENS) + 4 * WIDTH * LAYERS * sum(n**2 for n in TOKENS)
    assert meter.costs.recomputation(sizes.tokens, sizes.pairs) == again


def test_flex_attention_is_counted_or_said_not_to_be(model, caplog, monkeypatch):
    decoder = model.student.get_decoder()
    assert can_count(decoder)
    decoder.set_attn_implementation("flex_attention")
    monkeypatch.setattr("visper.training.flops.sees_around_compiled", lambda: False)
    assert not can_count(decoder) and "no 'mfu'" in caplog.text


@pytest.mark.slow
@pytest.mark.skipif(not sees_around_compiled(), reason="this torch compiles nothing under a dispatch mode")
def test_compiled_flex_attention_runs_while_operations_are_counted():
    query, key, value = (torch.randn(1, 2, 128, 16) for _ in range(3))  # of its own each, which torch 2.9 requires
    attend = torch.compile(flex_attention)
    expected, seen = attend(query, key, value), []

    def see(operation, args, kwargs):
        seen.append(operation)
        return operation(*args, **kwargs)

    with around_operations(see):
        found = attend(query, key, value)
        query @ query.mT
    torch.testing.assert_close(found, expected)
    assert any("bmm" in str(operation) or "matmul" in str(operation) for operation in seen)


def test_a_gpu_of_unknown_kind_has_no_peak_and_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Unheard-of 1")
    assert known_peak(torch.device("cuda")) is None and "Unheard-of" in caplog.text
    assert known_peak(torch.device("cpu")) is None and len(caplog.records) == 1
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert known_peak(torch.device("cuda")) == 989e12
