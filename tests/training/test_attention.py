"""Packed rows through real models: the same losses and gradients as padded ones, whatever the family."""

from types import SimpleNamespace

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Phi3Config,
    Qwen3Config,
)

from visper.common.errors import ConfigError
from visper.data.collator import Collator, Sample
from visper.data.packing import PackingCollator
from visper.model import Student
from visper.training import TrainingModel
from visper.training.attention import forwarding, packing_arguments, separate_samples
from visper.training.module import FORWARD_KEYS, PACKING_KEYS

FAMILIES = {"llama": LlamaConfig, "phi3": Phi3Config, "qwen3": Qwen3Config, "gemma3": Gemma3TextConfig}
IMAGE = 63
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 6,  # shorter than the samples, for families that have one
    "pad_token_id": 0,
    "attention_dropout": 0.0,
}


def model_of(family: str, attention: str = "sdpa") -> TrainingModel:
    """A tiny LLaVA around a text model of ``family``; everything learns."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    config = LlavaConfig(text_config=FAMILIES[family](**SIZES), vision_config=vision, image_token_index=IMAGE)
    config._attn_implementation = attention
    return TrainingModel(Student(LlavaForConditionalGeneration._from_config(config), None, {})).train()


def samples() -> list[Sample]:
    """Rows with and without image, of 1 to 14 tokens."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for number, (length, image) in enumerate([(9, True), (5, False), (14, True), (3, False), (1, False), (7, True)]):
        ids = torch.randint(1, 60, (length,), generator=generator).tolist()
        if image:
            ids[1:5] = [IMAGE] * 4
        labels = [-100] * (length - 2) + ids[-2:] if length > 1 else ids
        pixels = torch.randn(1, 3, 8, 8, generator=generator) if image else None
        found.append(Sample(str(number), ids, labels, (4,) if image else (), pixels))
    return found


def step(model: TrainingModel, collator: Collator | PackingCollator) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss and every gradient of one step over ``samples``."""
    batch = collator(samples())
    model.zero_grad()
    loss = model(**{k: batch[k] for k in FORWARD_KEYS if k in batch}, num_tokens=10, num_images=3)["loss"]
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_give_the_losses_and_gradients_of_padded_ones(family, attention, recompute):
    model = model_of(family, attention)
    if recompute:
        model.recompute_activations()
    loss, gradients = step(model, Collator(0))
    separate_samples(model.student.model.language_model)
    packed_loss, packed_gradients = step(model, PackingCollator(Collator(0)))
    torch.testing.assert_close(packed_loss, loss, rtol=1e-6, atol=0)
    assert packed_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        # Another order of summing.
        torch.testing.assert_close(packed_gradients[name], gradient, rtol=1e-4, atol=2e-6, msg=name)


def test_padded_batches_are_what_they_were_under_the_attention_for_packed_ones():
    model = model_of("gemma3")
    loss, gradients = step(model, Collator(0))
    separate_samples(model.student.model.language_model)
    again, same = step(model, Collator(0))
    assert torch.equal(again, loss) and all(torch.equal(same[name], gradients[name]) for name in gradients)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_no_sample_sees_its_neighbor_in_the_row(attention):
    model = model_of("llama", attention).eval()
    separate_samples(model.student.model.language_model)
    batch = PackingCollator(Collator(0))(samples())
    changed = batch["input_ids"].clone()
    changed[0, 9:14] = (changed[0, 9:14] + 7) % 60  # the second sample
    borders = {name: batch[name] for name in PACKING_KEYS & batch.keys()}
    llm = model.student.model.language_model
    with forwarding(llm, packing_arguments(llm, borders.pop("position_ids"), borders)):
        states = [
            model.student.model(input_ids=ids, pixel_values=batch["pixel_values"], use_cache=False)[0][0]
            for ids in (batch["input_ids"], changed)
        ]
    same = (states[0] == states[1]).all(1)
    assert same[:9].all() and same[14:].all() and not same[9:14].any()


def test_layers_that_carry_a_state_from_sample_to_sample_are_refused():
    config = SimpleNamespace(layer_types=["full_attention", "linear_attention"])
    with pytest.raises(ConfigError, match="linear_attention"):
        separate_samples(SimpleNamespace(config=config))
