"""Training begins exactly where the model is asked: a prompt is the beginning of its row, and all behind it is trained.

Checked for templates that write something between prompt and answer, with tokenizers that join it to the first word.
"""

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlavaProcessor, PreTrainedTokenizerFast

from tests.data.test_chat import CHATML, MARKERS, TEMPLATES, record
from visper.common.errors import ConfigError
from visper.data.chat import IGNORED, ConversationEncoder
from visper.data.chat_template import (
    PADDED,
    SENTINEL,
    SENTINELS,
    WITHOUT_THINKING,
    generation_prompt,
    llm_template,
    stripped_by,
    student_template,
)
from visper.data.images import build_image_processor

MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
VICUNA = (  # the prompt ends with a space, which a tokenizer would join to the answer's first word
    "{{ bos_token }}{% for m in messages %}{{ 'USER: ' if m['role'] == 'user' else 'ASSISTANT: ' }}{{ m['content'] }}"
    "{{ ' ' if m['role'] == 'user' else eos_token }}{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
SMOL = (
    "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}: {{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] + eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
QWEN_3 = (  # an empty thought before the last answer alone
    "{%- for m in messages %}{%- if m.role == 'assistant' %}{{- '<|im_start|>assistant\n' }}"
    "{%- if loop.last %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}{{- m.content.lstrip('\n') + '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)
ALL = {**TEMPLATES, "mistral": MISTRAL, "vicuna": VICUNA, "smol": SMOL, "zephyr": ZEPHYR, "qwen-3": QWEN_3}
WORDS = [
    "Yes, a cat.",
    " Yes",
    "User: What is it?",
    "Assistant: No",
    "[/INST] Yes",
    "ASSISTANT: Yes",
    "\n\nYes",
    "\nYes",
    "Yes\n\n",
]
SPECIAL = ["<unk>", "<s>", "</s>", "<image>", *MARKERS, "<|user|>", "<|assistant|>", "<|end|>"]


def byte_level(words: bool = True) -> Tokenizer:
    """``words``: it splits texts into words first, so no token has a newline and a letter."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(WORDS * 50, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet))
    return made


def sentencepiece() -> Tokenizer:
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    letters = sorted({*"".join(WORDS), *map(chr, range(33, 127)), "\n", "▁"})
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL[:3], initial_alphabet=letters)
    made.train_from_iterator(WORDS * 50, trainer)
    return made


TOKENIZERS = {"byte-level": byte_level(), "no words": byte_level(words=False), "sentencepiece": sentencepiece()}


def make_processor(template: str, tokenizer: str) -> LlavaProcessor:
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>", "unk_token": "<unk>"}
    made = PreTrainedTokenizerFast(tokenizer_object=TOKENIZERS[tokenizer], **names)
    made.add_tokens(SPECIAL, special_tokens=True)
    made.chat_template = template
    made.chat_template = llm_template(made)
    return LlavaProcessor(
        image_processor=build_image_processor("squash", 8, [0.5] * 3, [0.5] * 3),
        tokenizer=made,
        patch_size=4,
        vision_feature_select_strategy="full",
        chat_template=student_template(made.chat_template, "<image>", []),
    )


def asked(processor: Any, question: str) -> list[int]:
    """The ids of a prompt, as transformers makes them."""
    messages = [{"role": "user", "content": question}]
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    return list(processor.apply_chat_template(messages, **options)["input_ids"][0])


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("answer", ["Yes", "No, a cat."])
def test_all_behind_the_prompt_is_trained_and_nothing_before(name: str, tokenizer: str, answer: str) -> None:
    processor = make_processor(ALL[name], tokenizer)
    encoder = ConversationEncoder(processor)
    row = encoder.encode(record("What is it?\n", answer, image_turn=None))
    prompt = asked(processor, "What is it?\n")
    assert row.input_ids[: len(prompt)] == prompt
    assert encoder.prompt(record("What is it?\n", image_turn=None)) == prompt
    own = row.labels[len(prompt) :]
    trained = own[: own.index(IGNORED)] if IGNORED in own else own  # a template may end in a newline
    assert set(row.labels[: len(prompt)]) == {IGNORED} == {*own[len(trained) :]} | {IGNORED}
    assert processor.tokenizer.decode(trained, skip_special_tokens=True).strip() == answer.strip()
    assert processor.tokenizer.decode(trained[-1:]) in ("</s>", *SPECIAL)
    if tokenizer != "sentencepiece":
        messages = [{"role": "user", "content": "What is it?\n"}, {"role": "assistant", "content": answer}]
        rendered = processor.apply_chat_template(messages, tokenize=False)
        assert processor.tokenizer.decode(row.input_ids, skip_special_tokens=False) == rendered


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("name", ALL)
def test_each_question_of_a_conversation_is_asked_where_its_answer_is_trained(name: str, tokenizer: str) -> None:
    """Qwen 3's template writes the thought before a conversation's last answer only, so only there the two agree."""
    encoder = ConversationEncoder(make_processor(ALL[name], tokenizer))
    texts = ["What is it?", "Yes, a cat.", "What is it?", "No"]
    row = encoder.encode(record(*texts, image_turn=None))
    for turns in (3,) if name == "qwen-3" else (1, 3):
        prompt = encoder.prompt(record(*texts[:turns], image_turn=None))
        assert row.input_ids[: len(prompt)] == prompt
        assert row.labels[len(prompt)] != IGNORED and row.labels[len(prompt) - 1] == IGNORED


ONEVISION = (  # LLaVA-OneVision's: a space more before an answer than when it asks for one
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' }}{{ '\n' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_template_may_ask_with_other_whitespace() -> None:
    processor = make_processor(ONEVISION, "byte-level")
    assert processor.tokenizer.chat_template == ONEVISION
    row = ConversationEncoder(processor).encode(record("What is it?", "Yes", image_turn=None))
    assert processor.tokenizer.decode([label for label in row.labels if label != IGNORED]) == "Yes<|im_end|>"


def test_a_thinking_template_is_asked_for_answers_alone() -> None:
    template = make_processor(QWEN_3, "byte-level").tokenizer.chat_template
    assert template == WITHOUT_THINKING + QWEN_3
    assert make_processor(SMOL, "byte-level").tokenizer.chat_template == SMOL


def test_thinking_that_is_asked_for_in_the_system_turn_is_switched_off_too() -> None:
    """SmolLM3's prompts and answers agree in both modes; only its system turn differs."""
    mode = "{{ '/no_think' if enable_thinking is defined and not enable_thinking else '/think' }}"
    template = "<|im_start|>system\n" + mode + "<|im_end|>\n" + CHATML.replace("loop.first", "false")
    tokenizer = make_processor(template, "byte-level").tokenizer
    messages = [{"role": "user", "content": "What?"}]
    assert "/no_think" in tokenizer.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize(
    "template",
    [
        SMOL.replace("{% if add", "{% if true or add").replace("Assistant:", "Assistant: <think>"),
        QWEN_3.replace("enable_thinking is false", "enable_thinking"),
    ],
)
def test_a_template_whose_prompts_do_not_lead_to_its_answers_is_refused(template: str) -> None:
    with pytest.raises(ConfigError, match=r"asks for an answer with .*<think>|writes .*</think>.* before one"):
        make_processor(template, "byte-level")


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ("", ("", "")),
        (" | trim", (None, None)),
        (".lstrip('\n')", ("\n", "")),
        (".rstrip()", ("", None)),
        (".strip('\n')", ("\n", "\n")),
    ],
)
def test_what_a_template_strips_is_seen(filters: str, expected: tuple[str | None, str | None]) -> None:
    template = "{% for m in messages %}\n <s>{{ m['content']" + filters + " }} \n{% endfor %}"
    tokenizer = make_processor(SMOL, "byte-level").tokenizer

    def literals(text: str) -> list[str]:
        messages = [{"role": "user", "content": text.format(SENTINEL.format(i))} for i in range(2)]
        return SENTINELS.split(tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False))[0::2]

    assert stripped_by(literals("{}"), literals(PADDED)) == [expected] * 2


def test_a_template_that_rejects_the_question_has_no_prompt() -> None:
    tokenizer = make_processor(SMOL, "byte-level").tokenizer
    found = generation_prompt(tokenizer, "{{ raise_exception('no') }}", as_parts=False)
    assert (found.text, found.header) == ("", "")
