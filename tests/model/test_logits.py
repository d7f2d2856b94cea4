"""A student's logits are those of its LLM, whatever the LLM does to them, in memory and in the saved folder."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    LlavaForConditionalGeneration,
    MambaConfig,
    PhiConfig,
    RecurrentGemmaConfig,
    VaultGemmaConfig,
)

from tests import tiny
from visper.common.errors import ConfigError
from visper.config import Geometry
from visper.config import Student as StudentConfig
from visper.model import build_skeleton, build_student, load_student, save_student
from visper.model.logits import plain_head
from visper.training import TrainingModel

TOKENIZER = tiny.byte_tokenizer()
WORDS = len(TOKENIZER)
SIZES = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": TOKENIZER.bos_token_id,
    "eos_token_id": TOKENIZER.eos_token_id,
    "pad_token_id": None,
    "initializer_range": 0.3,  # so that the logits are large
}
SCALED = {
    "granite": GraniteConfig(**SIZES, logits_scaling=7.0, embedding_multiplier=12.0, tie_word_embeddings=False),
    "tied granite": GraniteConfig(**SIZES, logits_scaling=7.0, embedding_multiplier=12.0, tie_word_embeddings=True),
    "cohere": CohereConfig(**SIZES, logit_scale=0.0625),
}
PLAIN = {
    "llama": LlamaConfig(**SIZES),
    "tied llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "gemma3": Gemma3TextConfig(**SIZES, head_dim=8),
}
IDS = TOKENIZER("A cat sits on a mat.", return_tensors="pt")["input_ids"]


def llm_of(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()


@pytest.fixture
def made(tmp_path, tiny_encoder):
    """``made(config)``: the LLM, and the settings of a student from its folder."""

    def make(config):
        llm = llm_of(config)
        llm.save_pretrained(tmp_path / "llm")
        TOKENIZER.save_pretrained(tmp_path / "llm")
        return llm, StudentConfig(llm=str(tmp_path / "llm"), encoder=str(tiny_encoder))

    return make


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits[..., :WORDS]


@pytest.mark.parametrize("name", SCALED | PLAIN)
def test_a_student_and_its_saved_folder_have_the_logits_of_the_llm(name, made, tmp_path):
    llm, settings = made((SCALED | PLAIN)[name])
    student = build_student(settings, Geometry.SQUASH)
    expected = logits(llm)
    # A factor in the weight instead of behind it rounds differently: 4e-6 seen, of logits up to 40.
    close = {"rtol": 1e-5, "atol": 1e-5} if name in SCALED else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(logits(student.model), expected, **close)
    save_student(student, tmp_path / "saved")
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    assert torch.equal(logits(stock), logits(student.model))
    assert torch.equal(logits(load_student(tmp_path / "saved").model), logits(student.model))


@pytest.mark.parametrize("name", SCALED)
def test_training_begins_with_the_loss_of_the_llm(name, made):
    llm, settings = made(SCALED[name])
    student = build_student(settings, Geometry.SQUASH)
    labels = IDS.clone()
    labels[0, 0] = -100
    with torch.no_grad():
        expected = llm(input_ids=IDS, labels=IDS).loss
        model = TrainingModel(student).eval()
        found = model(IDS, torch.ones_like(IDS), labels, num_tokens=IDS.shape[1] - 1)["loss"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", SCALED | PLAIN)
def test_a_skeleton_has_the_parameters_of_the_student(name, made):
    _, settings = made((SCALED | PLAIN)[name])
    built, skeleton = build_student(settings, Geometry.SQUASH).model, build_skeleton(settings).model
    with torch.device("meta"):
        on_meta = build_skeleton(settings).model
    shapes = [{n: tuple(p.shape) for n, p in model.named_parameters()} for model in (built, skeleton, on_meta)]
    assert shapes[0] == shapes[1] == shapes[2]
    assert ("lm_head.weight" in shapes[0]) is (name not in ("tied llama", "gemma3"))


@pytest.mark.parametrize("name", SCALED)
def test_an_llm_built_from_the_saved_configuration_does_not_scale_twice(name, made):
    """vLLM builds the LLM of a LLaVA so."""
    llm, settings = made(SCALED[name])
    student = build_student(settings, Geometry.SQUASH)
    again = AutoModelForCausalLM.from_config(student.model.config.text_config).eval()
    again.base_model.load_state_dict(student.model.get_decoder().state_dict())
    again.lm_head.load_state_dict(student.model.lm_head.state_dict())
    torch.testing.assert_close(logits(again), logits(llm), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PLAIN)
def test_the_output_layer_of_an_llm_without_a_factor_is_left_alone(name):
    llm = llm_of(PLAIN[name])
    before = copy.deepcopy(llm.state_dict())
    assert plain_head(llm) is llm.get_output_embeddings()
    torch.testing.assert_close(llm.state_dict(), before, rtol=0, atol=0)
    assert logits(llm).shape == (*IDS.shape, WORDS)  # its own code runs again


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**SIZES, head_dim=8),
        VaultGemmaConfig(**SIZES, head_dim=8),
        RecurrentGemmaConfig(**SIZES, lru_width=32),
    ],
)
def test_an_llm_that_caps_its_logits_is_refused(config, made):
    _, settings = made(config)
    with pytest.raises(ConfigError, match=r"ForCausalLM does more to its logits .* use an LLM whose logits"):
        build_student(settings, Geometry.SQUASH)


def test_an_llm_whose_output_layer_has_a_bias_is_refused(made):
    """Transformers would drop the bias when it loads the saved LLaVA."""
    _, settings = made(PhiConfig(**SIZES))
    with pytest.raises(ConfigError, match=r"PhiForCausalLM has a bias, which LlavaForConditionalGeneration lacks"):
        build_student(settings, Geometry.SQUASH)


def test_an_llm_that_computes_its_logits_in_another_way_is_refused():
    class Twice(nn.Module):
        def __init__(self, llm):
            super().__init__()
            self.llm = llm

        def get_decoder(self):
            return self.llm.get_decoder()

        def get_output_embeddings(self):
            return self.llm.get_output_embeddings()

        def forward(self, **inputs):
            self.llm(**inputs)
            return self.llm(**inputs)

    with pytest.raises(ConfigError, match=r"cannot find out how Twice computes its logits \(ValueError"):
        plain_head(Twice(llm_of(PLAIN["llama"])))


def test_a_model_that_casts_its_states_before_the_output_layer_has_plain_logits():
    llm = llm_of(MambaConfig(vocab_size=WORDS, hidden_size=32, num_hidden_layers=1, state_size=4)).bfloat16()
    assert plain_head(llm) is llm.get_output_embeddings()
