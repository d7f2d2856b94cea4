"""Prompts, input ids and labels equal the published ones for Llama-3 (golden fixture g5).

Where we deviate, on purpose:

- labels: the published mask begins one token early, at the header's "\n\n", in every answer;
- an empty answer: the published prompt leaves its end-of-turn token out and drops the whole sample; ours writes
  the turn and supervises the others;
- control tokens written out in a text (`<|eot_id|>`): published as real ones, and the sample dropped; ours as text;
- an image without a tag: published without image features; ours shows it before the first question;
- two tags in one row: published with one image and a mangled text; ours is a bad row.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, LlavaProcessor

from tests.conftest import PROJECT_GOLDEN, Golden
from visper.common.errors import DataError
from visper.data.chat import IGNORED, ConversationEncoder, Encoded
from visper.data.chat_template import student_template
from visper.data.images import build_image_processor
from visper.data.rows.formats import parse_row

PUBLISHED_IMAGE = -200
ENDLESS = 100_000


@pytest.fixture(scope="module")
def fixture(golden: Golden) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(golden.path("g5_text.json").read_text(encoding="utf-8"))
    return content


@pytest.fixture(scope="module")
def cases(fixture: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = fixture["runs"]["llama3"]["cases"]
    return found


@pytest.fixture(scope="module")
def encoder(golden: Golden, cases: dict[str, Any]) -> ConversationEncoder:
    # A set without its own excerpt of the tokenizer needs no other, unless its conversations differ: then ids differ.
    own = golden.path("g5_text.json").parent / "g5_tokenizer"
    tokenizer = AutoTokenizer.from_pretrained(own if own.exists() else PROJECT_GOLDEN / "g5_tokenizer")
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    # The published system prompt, read from the fixture: it is no part of the LLM's template.
    first = cases["single_image_first"]["prompt"]
    system = first.split("<|end_header_id|>\n\n", 1)[1].split("<|eot_id|>", 1)[0]
    processor = LlavaProcessor(
        image_processor=build_image_processor("pad", 14, [0.5] * 3, [0.5] * 3),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="full",
        chat_template=student_template(tokenizer.chat_template, "<image>", [], system),
    )
    return ConversationEncoder(processor, ENDLESS)


def encode(encoder: ConversationEncoder, fixture: dict[str, Any], name: str) -> Encoded:
    return encoder.encode(parse_row(fixture["conversations"][name], name, Path("images")))


def published_ids(encoder: ConversationEncoder, case: dict[str, Any]) -> list[int]:
    return [encoder.image_token_id if token == PUBLISHED_IMAGE else token for token in case["input_ids"]]


def published_labels(case: dict[str, Any]) -> list[int]:
    """Its labels less the header token with which each answer's mask begins."""
    labels = case["labels"]
    return [IGNORED if i == 0 or labels[i - 1] == IGNORED else label for i, label in enumerate(labels)]


SAME = [
    "pt_caption",
    "single_image_first",
    "multi_turn_image",
    "text_only_single",
    "text_only_multi",
    "image_tag_at_end_multi",
    "image_in_second_turn",
    "unicode",
    "starts_with_gpt",
    "answer_leading_space_newline",
    "very_long_image",
    "very_long_answer_image",
]


@pytest.mark.parametrize("name", SAME)
def test_ids_and_labels_equal_the_published(
    encoder: ConversationEncoder, fixture: dict[str, Any], cases: dict[str, Any], name: str
) -> None:
    assert encoder.num_image_tokens == 1
    encoded = encode(encoder, fixture, name)
    assert encoded.input_ids == published_ids(encoder, cases[name])
    assert encoded.labels == published_labels(cases[name])
    text = encoder.tokenizer.decode(encoded.input_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert text == "<|begin_of_text|>" + cases[name]["prompt"]


def test_text_rows_are_cut_where_the_published_ones_are(
    encoder: ConversationEncoder, fixture: dict[str, Any], cases: dict[str, Any]
) -> None:
    limit = fixture["runs"]["llama3"]["model_max_length"]
    case = cases["very_long_text"]
    # The published ids are cut while tokenizing; of the answer nothing is left.
    with pytest.raises(DataError, match=f"none within {limit} tokens"):
        encode(ConversationEncoder(encoder.processor, limit), fixture, "very_long_text")
    assert set(case["labels"]) == {IGNORED}
    assert encode(encoder, fixture, "very_long_text").input_ids[:limit] == case["input_ids"]


def test_an_empty_answer_before_others_costs_only_itself(
    encoder: ConversationEncoder, fixture: dict[str, Any], cases: dict[str, Any]
) -> None:
    encoded = encode(encoder, fixture, "empty_answer_then_more")
    ids, labels = encoded.input_ids, encoded.labels
    end = encoder.tokenizer.convert_tokens_to_ids("<|eot_id|>")
    extra = next(
        i
        for i, (a, b) in enumerate(zip(ids, published_ids(encoder, cases["empty_answer_then_more"]), strict=False))
        if a != b
    )
    assert ids[extra] == end
    assert ids[:extra] + ids[extra + 1 :] == published_ids(encoder, cases["empty_answer_then_more"])
    assert encoder.tokenizer.decode([label for label in labels if label != IGNORED]) == "No.<|eot_id|>"
    assert set(cases["empty_answer_then_more"]["labels"]) == {IGNORED}  # the published fault


def test_control_tokens_in_a_question_are_text_and_cost_nothing(
    encoder: ConversationEncoder, fixture: dict[str, Any], cases: dict[str, Any]
) -> None:
    encoded = encode(encoder, fixture, "special_text_inside")
    tokenizer = encoder.tokenizer
    text = tokenizer.decode(encoded.input_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert text == "<|begin_of_text|>" + cases["special_text_inside"]["prompt"]
    end = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert encoded.input_ids.count(end) == cases["special_text_inside"]["input_ids"].count(end) - 1
    assert tokenizer.decode([label for label in encoded.labels if label != IGNORED]) == "ok<|eot_id|>"
    assert set(cases["special_text_inside"]["labels"]) == {IGNORED}  # the published fault


def test_an_image_without_a_tag_is_shown(
    encoder: ConversationEncoder, fixture: dict[str, Any], cases: dict[str, Any]
) -> None:
    encoded = encode(encoder, fixture, "image_key_no_tag")
    assert encoded.input_ids.count(encoder.image_token_id) == 1
    assert PUBLISHED_IMAGE not in cases["image_key_no_tag"]["input_ids"]  # the published fault


@pytest.mark.parametrize(
    ("name", "reason"),
    [("two_image_tags_one_sentence", "images and tags differ"), ("empty_answer", "no supervised token")],
)
def test_rows_with_nothing_to_learn_or_several_tags_are_bad(
    encoder: ConversationEncoder, fixture: dict[str, Any], name: str, reason: str
) -> None:
    with pytest.raises(DataError) as error:
        encode(encoder, fixture, name)
    assert error.value.reason == reason
