"""Labels contain exactly the answers, whatever the texts; images are kept, whatever is cut."""

import hashlib
import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import LlavaProcessor, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tests import tiny
from visper.common.errors import ConfigError, DataError
from visper.data.chat import IGNORED, ConversationEncoder, Encoded
from visper.data.chat_template import end_of_turn_token, student_template
from visper.data.images import build_image_processor
from visper.data.rows.formats import parse_row
from visper.data.rows.records import Record, ShownImage, Turn
from visper.data.show import show_sample

TASK_TOKENS = [f"<|{task}_{i}|>" for task in ("depth", "seg", "gen") for i in range(1, 9)]
SYSTEM = "You are 'helpful'.\nTruly \\o/ {{ 1 }} {% if %}."
# The published chat formats, written after the model cards.
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
PHI_3 = (  # knows no system turn, and opens the answer itself
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<|user|>\n{{ m['content'] }}<|end|>\n"
    "<|assistant|>\n{% elif m['role'] == 'assistant' %}{{ m['content'] }}<|end|>\n{% endif %}{% endfor %}"
)
CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<|start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|stop|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
TEMPLATES = {"llama-3": LLAMA_3, "phi-3": PHI_3, "chatml": CHATML, "gemma": GEMMA}
MARKERS = [
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start|>",
    "<|stop|>",
]


def make_tokenizer(template: str) -> PreTrainedTokenizerBase:
    tokenizer = tiny.byte_tokenizer()
    tokenizer.add_tokens([*MARKERS, "<image>", *TASK_TOKENS], special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def make_processor(template: str, task_tokens: list[str] = TASK_TOKENS, system: str | None = None) -> LlavaProcessor:
    return LlavaProcessor(
        image_processor=build_image_processor("squash", 8, [0.5] * 3, [0.5] * 3),
        tokenizer=make_tokenizer(template),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=student_template(template, "<image>", task_tokens, system),
    )


PROCESSORS = {name: make_processor(template) for name, template in TEMPLATES.items()}


def record(*texts: str, image_turn: int | None = 0) -> Record:
    turns = tuple(Turn("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(texts))
    return Record("r", turns, () if image_turn is None else (ShownImage("a.jpg", image_turn),))


def supervised(tokenizer: PreTrainedTokenizerBase, encoded: Encoded) -> list[str]:
    """The stretches of supervised tokens, decoded."""
    stretches: list[list[int]] = [[]]
    for label in encoded.labels:
        if label != IGNORED:
            stretches[-1].append(label)
        elif stretches[-1]:
            stretches.append([])
    return [tokenizer.decode(stretch, skip_special_tokens=False) for stretch in stretches if stretch]


def whole(tokenizer: PreTrainedTokenizerBase, encoded: Encoded) -> str:
    return tokenizer.decode(encoded.input_ids, skip_special_tokens=False)


@pytest.mark.parametrize("name", TEMPLATES)
def test_exactly_the_answers_and_their_end_of_turn_are_supervised(name: str) -> None:
    processor = PROCESSORS[name]
    end = end_of_turn_token(processor.tokenizer)
    encoded = ConversationEncoder(processor, 500).encode(record("What?", "A cat.", "Sure?", "Yes"))
    assert supervised(processor.tokenizer, encoded) == [f"A cat.{end}", f"Yes{end}"]
    assert [a for a, b in zip(encoded.input_ids, encoded.labels, strict=True) if b not in (IGNORED, a)] == []


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("system", [None, SYSTEM])
def test_training_prompts_equal_inference_prompts(name: str, system: str | None) -> None:
    processor = make_processor(TEMPLATES[name], system=system)
    messages = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": [{"type": "image", "image": tiny_picture()}, {"type": "text", "text": "What?"}]},
    ]
    prompt = processor.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True)
    ids = prompt["input_ids"][0]
    encoded = ConversationEncoder(processor, 500).encode(record("Hello", "Hi", "What?", "A cat.", image_turn=2))
    assert encoded.input_ids[: len(ids)] == list(ids)
    assert encoded.labels[len(ids)] != IGNORED
    assert encoded.labels[len(ids) - 1] == IGNORED
    text = whole(processor.tokenizer, encoded)
    assert text.count(SYSTEM) == (system is not None)
    assert "<image>" * 4 + "".join(TASK_TOKENS) + "\nWhat?" in text


def test_rows_of_one_image_keep_their_ids_and_labels() -> None:
    """Those of the code that knew rows of one image alone (f365acd): four templates, cut and not."""
    image = {"type": "image"}
    rows = [
        chat("<image>\nWhat?", "A cat.", image="a.jpg"),
        chat("What? <image> ", " A cat. ", "Sure <image?", "Yes <|eot_id|>", image="a.jpg"),
        chat("Hi", "Hi", "a <image> b", "c", images=["a.jpg"]),
        chat("<image>", "A cat.", image=["a.jpg"]),
        chat([text_part(" one "), image, text_part(" two")], "A <image>.", image="a.jpg"),
        chat("What?", "A.", "B?", "b" * 90, image="a.jpg"),
        chat("What is <image> <|depth_1|>?", "A tag."),
    ]
    digest = hashlib.sha256()
    for name, max_tokens, row in product(TEMPLATES, (60, 90, 10_000), rows):
        encoder, parsed = ConversationEncoder(PROCESSORS[name], max_tokens), parse_row(row, "r", Path("images"))
        try:
            encoded = encoder.encode(parsed)
            found: Any = [encoded.input_ids, encoded.labels, encoded.truncated, encoder.prompt(parsed)]
        except DataError as error:
            found = error.reason
        digest.update(json.dumps(found).encode())
    assert digest.hexdigest()[:16] == "a89afac06b79ebec"


def text_part(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def chat(*contents: Any, **keys: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)], **keys}


def tiny_picture() -> Image.Image:
    return Image.fromarray(np.zeros((6, 9, 3), dtype=np.uint8))


@pytest.mark.parametrize("order", ["image first", "text first"])
def test_the_image_leads_its_turn(order: str) -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
    content = parts if order == "image first" else parts[::-1]
    text = PROCESSORS["chatml"].apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    assert f"user\n<image>{''.join(TASK_TOKENS)}\nWhat?<|im_end|>" in text


def test_a_question_of_the_image_alone_is_the_same_in_training() -> None:
    processor = PROCESSORS["chatml"]
    messages = [{"role": "user", "content": [{"type": "image", "image": tiny_picture()}]}]
    prompt = processor.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True)
    encoded = ConversationEncoder(processor, 500).encode(record("", "A cat."))
    assert encoded.input_ids[: len(prompt["input_ids"][0])] == list(prompt["input_ids"][0])


def test_a_system_turn_of_the_conversation_takes_the_prompts_place() -> None:
    processor = make_processor(CHATML, system=SYSTEM)
    turns = (Turn("system", "Be odd."), Turn("user", "Q"), Turn("assistant", "A"))
    text = whole(processor.tokenizer, ConversationEncoder(processor, 500).encode(Record("r", turns)))
    assert text.startswith("<|im_start|>system\nBe odd.<|im_end|>") and SYSTEM not in text


@pytest.mark.parametrize("name", ["phi-3", "gemma"])
def test_a_system_turn_that_the_template_does_not_take_makes_the_row_bad(name: str) -> None:
    turns = (Turn("system", "Be odd."), Turn("user", "Q"), Turn("assistant", "A"))
    with pytest.raises(DataError, match="chat template"):
        ConversationEncoder(PROCESSORS[name], 500).encode(Record("r", turns))


def test_a_template_without_end_of_turn_is_refused() -> None:
    with pytest.raises(ConfigError, match="no special token after an answer"):
        end_of_turn_token(make_tokenizer("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"))


PIECES = st.sampled_from(
    [*MARKERS, *TASK_TOKENS[:2], "<image>", "<s>", "</s>", "<|", "|>", "\n", " ", "é", "🐈‍⬛", "ok"]
)
TEXTS = st.one_of(st.text(max_size=20), st.lists(PIECES, max_size=5).map("".join)).map(
    lambda text: text.encode("utf-8", "ignore").decode("utf-8")
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(TEMPLATES)), st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3), st.booleans())
def test_any_text_gives_one_image_and_labels_that_decode_to_the_answers(
    name: str, exchanges: list[tuple[str, str]], shown: bool
) -> None:
    processor = PROCESSORS[name]
    tokenizer = processor.tokenizer
    encoder = ConversationEncoder(processor, 5000)
    texts = [text for exchange in exchanges for text in exchange]
    answers = [answer for _, answer in exchanges if answer.strip()]
    if not answers:
        with pytest.raises(DataError, match="no supervised token"):
            encoder.encode(record(*texts, image_turn=0 if shown else None))
        return
    encoded = encoder.encode(record(*texts, image_turn=0 if shown else None))
    end = end_of_turn_token(tokenizer)
    assert supervised(tokenizer, encoded) == [answer + end for answer in answers]
    assert encoded.input_ids.count(encoder.image_token_id) == encoder.num_image_tokens * shown
    for token in TASK_TOKENS:
        assert encoded.input_ids.count(tokenizer.convert_tokens_to_ids(token)) == shown
    # Control tokens come from the template alone: as many as for the same turns with harmless texts.
    plain = encoder.encode(record(*["x" if text else "" for text in texts], image_turn=0 if shown else None))
    special = set(tokenizer.added_tokens_decoder)
    assert [i for i in encoded.input_ids if i in special] == [i for i in plain.input_ids if i in special]


def test_an_empty_answer_is_context_and_not_supervised() -> None:
    processor = PROCESSORS["llama-3"]
    encoded = ConversationEncoder(processor, 500).encode(record("A?", "", "B?", "b"))
    assert supervised(processor.tokenizer, encoded) == ["b<|eot_id|>"]
    assert "assistant<|end_header_id|>\n\n<|eot_id|>" in whole(processor.tokenizer, encoded)


def block_of(encoder: ConversationEncoder, encoded: Encoded) -> list[int]:
    at = encoded.input_ids.index(encoder.image_token_id)
    return encoded.input_ids[at : at + encoder.num_image_tokens + len(TASK_TOKENS)]


@pytest.mark.parametrize("image_turn", [0, 2])
@pytest.mark.parametrize("max_tokens", [60, 90, 130, 10_000])
def test_only_text_is_cut_never_the_image(
    image_turn: int, max_tokens: int, encoder_for: Callable[[int], ConversationEncoder]
) -> None:
    row = record("Q", "a" * 40, "Q", "b" * 200, image_turn=image_turn)
    encoder = encoder_for(max_tokens)
    full = encoder_for(10_000).encode(row)
    encoded = encoder.encode(row)
    assert len(encoded.input_ids) <= max_tokens
    assert encoded.truncated == (len(full.input_ids) > max_tokens)
    assert block_of(encoder, encoded) == block_of(encoder, full)
    assert len(encoded.labels) == len(encoded.input_ids)


@pytest.fixture
def encoder_for() -> Callable[[int], ConversationEncoder]:
    return lambda max_tokens: ConversationEncoder(PROCESSORS["phi-3"], max_tokens)


def test_a_row_whose_labels_are_all_cut_away_is_bad() -> None:
    with pytest.raises(DataError) as error:
        ConversationEncoder(PROCESSORS["phi-3"], 60).encode(record("long " * 50, "A"))
    assert error.value.reason == "no supervised token"


def test_an_image_longer_than_a_row_is_refused() -> None:
    with pytest.raises(DataError, match="max_tokens is 20"):
        ConversationEncoder(PROCESSORS["phi-3"], 20).encode(record("Q", "A"))


def test_a_shown_sample_marks_the_answers_and_collapses_the_image() -> None:
    processor: Any = PROCESSORS["chatml"]
    encoder = ConversationEncoder(processor, 500)
    encoded = encoder.encode(record("What?", "A cat."))
    text = show_sample(processor.tokenizer, encoded.input_ids, encoded.labels, encoder.image_token_id)
    assert "<image> x 4 <|depth_1|>" in text.plain
    green = [text.plain[span.start : span.end] for span in text.spans if "green" in str(span.style)]
    assert green == ["A cat.<|im_end|>"]


def test_spaces_that_a_tokenizer_cuts_off_its_spans_are_supervised() -> None:
    """As GPT-NeoX's does, and those trained as in the documentation of tokenizers."""
    processor = make_processor(CHATML)
    trimming = processors.Sequence([processors.ByteLevel(trim_offsets=True)])
    processor.tokenizer.backend_tokenizer.post_processor = trimming
    answer = "two  <|im_end|>   words "
    encoded = ConversationEncoder(processor, 500).encode(record("What?", answer))
    assert supervised(processor.tokenizer, encoded) == [answer + "<|im_end|>"]


def sentencepiece_tokenizer(prefix: str, rstrip: bool) -> PreTrainedTokenizerFast:
    """Phi-3's kind: a space before the first or every piece, marker tokens that swallow the space after them."""
    letters = [*"▁abcdefghijklmnopqrstuvwxyzABC.?<|>_/0123456789", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {piece: i for i, piece in enumerate(["<unk>", "<s>", "</s>", *letters, "▁A", "▁c"])}
    core = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[("▁", "A"), ("▁", "c")], byte_fallback=True, unk_token="<unk>")
    )
    if prefix == "every piece":
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    markers = [AddedToken(f"<|{name}|>", rstrip=rstrip, normalized=False) for name in ("user", "assistant", "end")]
    tokenizer.add_tokens([*markers, "<image>"], special_tokens=True)
    return tokenizer


@pytest.mark.parametrize("rstrip", [True, False])
@pytest.mark.parametrize("prefix", ["every piece", "first piece"])
def test_sentencepiece_tokenizers_supervise_the_answers_too(prefix: str, rstrip: bool) -> None:
    tokenizer = sentencepiece_tokenizer(prefix, rstrip)
    processor = LlavaProcessor(
        image_processor=build_image_processor("squash", 8, [0.5] * 3, [0.5] * 3),
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="full",
        chat_template=student_template(PHI_3, "<image>", []),
    )
    encoder = ConversationEncoder(processor, 500)
    encoded = encoder.encode(record("Say <|end|> and <image>.", "A cat. <|user|>", "é?", "é"))
    assert [text.lstrip() for text in supervised(tokenizer, encoded)] == ["A cat. <|user|><|end|>", "é<|end|>"]
    assert encoded.input_ids.count(encoder.image_token_id) == 4
