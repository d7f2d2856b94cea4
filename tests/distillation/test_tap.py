import pytest
import torch
from transformers import Lfm2Config, Lfm2Model, LlamaConfig, LlamaModel

from visper.distillation import HiddenStateTap


@pytest.fixture
def decoder():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    return LlamaModel(config)


IDS = torch.tensor([[3, 4, 5, 6]])


def test_states_equal_the_models_own_counted_from_one(decoder):
    expected = decoder(IDS, output_hidden_states=True).hidden_states
    with HiddenStateTap(decoder, (1, 2, 3)) as hidden:
        decoder(IDS)
        for layer in (1, 2, 3):
            assert torch.equal(hidden[layer], expected[layer])


def test_state_of_the_last_layer_is_after_the_final_norm(decoder):
    with HiddenStateTap(decoder, (3,)) as hidden:
        assert torch.equal(decoder(IDS).last_hidden_state, hidden[3])


def test_lfm2_calls_its_final_norm_by_another_name():
    config = Lfm2Config(
        vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, layer_types=["conv", "full_attention"],
    )  # fmt: skip
    decoder = Lfm2Model(config).eval()
    with HiddenStateTap(decoder, (2,)) as hidden:
        assert torch.equal(decoder(IDS).last_hidden_state, hidden[2])


def gradients(decoder):
    decoder.zero_grad()
    with HiddenStateTap(decoder, (1, 3)) as hidden:
        decoder(IDS)
        (hidden[1].square().sum() + hidden[3].sum()).backward()
    return [parameter.grad.clone() for parameter in decoder.parameters() if parameter.grad is not None]


def test_checkpointing_changes_no_gradient(decoder):
    plain = gradients(decoder.train())
    decoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    recomputed = gradients(decoder)
    assert len(plain) == len(recomputed) > 0
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


def test_nothing_stays_behind(decoder):
    with HiddenStateTap(decoder, (2,)) as hidden:
        decoder(IDS)
    assert hidden == {}
    assert not decoder.layers[1]._forward_hooks
    decoder(IDS)
    assert hidden == {}


@pytest.mark.parametrize("layer", [-1, 4])
def test_layer_beyond_the_model_is_refused(decoder, layer):
    with pytest.raises(ValueError, match=f"layer {layer} does not exist: the model has layers 1 to 3"):
        HiddenStateTap(decoder, (layer,))


def test_a_module_without_layers_is_refused():
    with pytest.raises(ValueError, match="get_decoder"):
        HiddenStateTap(torch.nn.Linear(2, 2), (1,))
