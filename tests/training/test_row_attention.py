"""Samples of a row in LLMs of many families: each has the logits that transformers computes for it in its own row."""

import shutil
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    AfmoeConfig,
    AttentionInterface,
    AutoModelForCausalLM,
    DogeConfig,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    NemotronConfig,
    OlmoeConfig,
    PhimoeConfig,
    RwkvConfig,
    StableLmConfig,
    XGLMConfig,
)

from visper.common.compat import attention_of
from visper.common.errors import ConfigError
from visper.training.attention import ROW, forwarding, packing_arguments, padded_arguments, separate_samples
from visper.training.row_attention import Row, RowMask, current_row, row_mask, sample_sdpa

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,  # so that attention moves the logits
}
EXPERTS = {"num_experts_per_tok": 2}
LLMS = {
    "afmoe": AfmoeConfig(**SIZES, **EXPERTS, head_dim=8, num_experts=4, moe_intermediate_size=16, sliding_window=6),
    "doge": DogeConfig(**SIZES, sliding_window=6),
    "gpt_oss": GptOssConfig(**SIZES, **EXPERTS, head_dim=8, num_local_experts=4, sliding_window=6),
    "llama": LlamaConfig(**SIZES),
    "mixtral": MixtralConfig(**SIZES, **EXPERTS, num_local_experts=4, sliding_window=6),
    "nemotron": NemotronConfig(**SIZES),
    "olmoe": OlmoeConfig(**SIZES, **EXPERTS, num_experts=4, sliding_window=6),
    "phimoe": PhimoeConfig(**SIZES, **EXPERTS, num_local_experts=4, sliding_window=6),
    "stablelm": StableLmConfig(**SIZES),
    "xglm": XGLMConfig(vocab_size=64, d_model=32, ffn_dim=32, num_layers=2, attention_heads=4, init_std=0.3),
}
SAMPLES = (torch.arange(3, 11), torch.arange(20, 32), torch.arange(40, 49))


def llm_of(name, attention=None):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(deepcopy(LLMS[name])).eval()
    if attention is not None:
        model.get_decoder().set_attn_implementation(attention)
    return model


def packed(samples):
    """The samples in one row, and where they begin."""
    lengths = [len(sample) for sample in samples]
    begins = torch.tensor([0, *lengths]).cumsum(0).int()
    borders = {"lengths": lengths, "cu_seq_lens_q": begins, "cu_seq_lens_k": begins}
    longest = {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return torch.cat(list(samples))[None], positions, borders | longest


@torch.no_grad()
def logits_of_packed(model, samples=SAMPLES):
    llm = model.get_decoder()
    ids, positions, borders = packed(samples)
    with forwarding(llm, packing_arguments(llm, positions, borders)):
        return model(input_ids=ids, use_cache=False).logits[0]


@torch.no_grad()
def alone(model):
    return torch.cat([model(input_ids=sample[None], use_cache=False).logits[0] for sample in SAMPLES])


CASES = [(name, attention) for name in LLMS for attention in ("sdpa", "eager") if (name, attention) != ("xglm", "sdpa")]


@pytest.mark.parametrize(("name", "attention"), [case for case in CASES if case != ("gpt_oss", "sdpa")])
def test_samples_of_a_packed_row_have_the_logits_of_their_own_rows(name, attention):
    """GPT-OSS, AFMoE and XGLM do not tell transformers where samples begin."""
    model = llm_of(name, attention)
    expected = alone(model)
    separate_samples(model.get_decoder())
    # Sums in another order: 3e-6 seen, of logits up to 10.
    torch.testing.assert_close(logits_of_packed(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow  # flex attention is compiled
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for the CPU needs a C++ compiler")
@pytest.mark.parametrize("name", ["afmoe", "llama"])
def test_flex_attention_separates_samples_whatever_the_llm_tells(name):
    model = llm_of(name)
    expected = alone(model)
    model.get_decoder().set_attn_implementation("flex_attention")
    separate_samples(model.get_decoder())
    torch.testing.assert_close(logits_of_packed(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LLMS)
def test_padded_rows_have_the_logits_of_transformers(name):
    """Windows included, which PhiMoE and Doge keep in their mask only, and OLMoE passes to flash attention only."""
    model = llm_of(name)
    ids = torch.arange(3, 33)[None]
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        separate_samples(model.get_decoder())
        with forwarding(model.get_decoder(), padded_arguments(model.get_decoder(), ids)):
            found = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_an_llm_that_asks_transformers_for_no_mask_is_refused():
    config = RwkvConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, context_length=64)
    model = AutoModelForCausalLM.from_config(config).eval()
    llm = model.base_model
    ids, positions, borders = packed(SAMPLES)
    with (
        pytest.raises(ConfigError, match=r"RwkvModel does not build its attention mask .* optimization.packing=false"),
        forwarding(llm, packing_arguments(llm, positions, borders)),
    ):
        llm(input_ids=ids, use_cache=False)
    assert current_row.get() is None


def test_layers_with_a_convolution_over_tokens_are_refused_whatever_the_configuration_calls_them():
    layers = nn.ModuleList([nn.ModuleDict({"conv": nn.Conv1d(4, 4, 4)})])
    with pytest.raises(ConfigError, match=r"layers of type \['Conv1d'\]"):
        separate_samples(SimpleNamespace(config=SimpleNamespace(), layers=layers))


@pytest.mark.parametrize("read", [lambda m: m + torch.ones(2), lambda m: torch.ones(2) + m, lambda m: m[0], "dtype"])
def test_a_layer_that_calculates_with_the_mask_is_told_what_to_set(read):
    with pytest.raises(ConfigError, match=r"set optimization.attention=eager"):
        getattr(RowMask(), read) if isinstance(read, str) else read(RowMask())
    assert not hasattr(RowMask(), "dtype")


def test_an_attention_pattern_of_the_llms_own_is_kept_in_padded_rows_and_refused_in_packed_ones():
    wanted = {
        "batch_size": 1,
        "q_length": 3,
        "kv_length": 3,
        "mask_function": lambda batch, head, query, key: key <= query,
        "use_vmap": False,
        "allow_is_causal_skip": False,
        "config": LLMS["llama"],
    }
    llm = llm_of("llama").get_decoder()
    separate_samples(llm)
    _, positions, borders = packed(SAMPLES)
    rows = [Row(), packing_arguments(llm, positions, borders)[ROW]]
    for row in rows:
        token = current_row.set(row)
        try:
            if row.samples:
                with pytest.raises(ConfigError, match=r"\(llama\) has an attention pattern .* set optim"):
                    row_mask(**wanted)
            else:
                assert row_mask(**wanted)[0, 0].tolist() == torch.ones(3, 3).tril().bool().tolist()
        finally:
            current_row.reset(token)


def test_flash_attention_that_is_not_told_where_samples_begin_is_refused():
    """StableLM's layers, for one, drop the arguments. The kernel itself needs a GPU."""
    llm = SimpleNamespace(config=SimpleNamespace(_attn_implementation="flash_attention_2"))
    separate_samples(llm)
    attend = AttentionInterface()["flash_attention_2"]
    _, positions, borders = packed(SAMPLES)
    given = packing_arguments(llm, positions, borders)
    assert given["cu_seq_lens_q"].tolist() == [0, 8, 20, 29]
    token = current_row.set(given[ROW])
    try:
        with pytest.raises(ConfigError, match=r"Module is not told where .* set optimization.attention=sdpa"):
            attend(nn.Module(), torch.ones(1), torch.ones(1), torch.ones(1), None)
    finally:
        current_row.reset(token)


def test_attention_outside_of_a_row_is_stock_sdpa():
    model = llm_of("mixtral")
    expected = alone(model)
    separate_samples(model.get_decoder())
    assert attention_of(model.get_decoder()) == "visper_sample_sdpa"
    torch.testing.assert_close(alone(model), expected, rtol=0, atol=0)
    query = torch.randn(1, 4, 5, 8)
    module = nn.Module()
    module.is_causal = True
    stock, _ = AttentionInterface()["sdpa"](module, query, query, query, None)
    assert torch.equal(sample_sdpa(module, query, query, query, None)[0], stock)
