"""Chat templates as LLMs bring them: prompts are those of the plain template, in training, asked here and by others."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import AutoProcessor, AutoTokenizer, LlavaProcessor

from tests.tiny import CHAT_TEMPLATE
from visper.common.errors import ConfigError
from visper.config import Geometry
from visper.config import Student as StudentConfig
from visper.data.chat import ConversationEncoder
from visper.data.rows.records import Record, ShownImage, Turn
from visper.evaluation.ask import model_inputs
from visper.model import build_processor

PICTURE = Image.effect_mandelbrot((20, 16), (-2, -1, 1, 1), 60).convert("RGB")
WITHOUT_FIRST = CHAT_TEMPLATE.replace("{{ bos_token }}", "")
OTHER = "{{ bos_token }}tools!"


def named(**templates: str) -> Callable[[Path], None]:
    def write(llm: Path) -> None:
        (llm / "chat_template.jinja").unlink()
        settings = json.loads((llm / "tokenizer_config.json").read_text())
        settings["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
        (llm / "tokenizer_config.json").write_text(json.dumps(settings))

    return write


def beside_the_template(llm: Path) -> None:
    (llm / "additional_chat_templates").mkdir()
    (llm / "additional_chat_templates" / "tool_use.jinja").write_text(OTHER)


def adding(template: str, around: str) -> Callable[[Path], None]:
    """An LLM with that template, whose tokenizer puts tokens ``around`` every text."""

    def write(llm: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(llm)
        ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=around, special_tokens=ids)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(llm)

    return write


def processor_of(llm: Path, encoder: Path, change: Callable[[Path], None]) -> LlavaProcessor:
    change(llm)
    return build_processor(StudentConfig(llm=str(llm), encoder=str(encoder)), Geometry.SQUASH)


@pytest.fixture
def llm(tiny_llm: Path, tmp_path: Path) -> Path:
    AutoTokenizer.from_pretrained(tiny_llm).save_pretrained(tmp_path / "llm")
    return tmp_path / "llm"


def test_a_processor_shows_no_bar_for_weights_that_it_does_not_need(tiny_llm, tiny_encoder, capfd):
    processor_of(tiny_llm, tiny_encoder, lambda llm: None)
    assert "Loading weights" not in capfd.readouterr().err


USABLE = {
    "several named": named(default=CHAT_TEMPLATE, tool_use=OTHER),
    "one named default": named(default=CHAT_TEMPLATE),
    "one named otherwise": named(chat=CHAT_TEMPLATE),
    "others beside it": beside_the_template,
    "newline before the first token": adding("\n" + CHAT_TEMPLATE, "<s> $A"),
    "first token by the tokenizer": adding(WITHOUT_FIRST, "<s> $A"),
    "last token by the tokenizer": adding(CHAT_TEMPLATE, "<s> $A </s>"),
    "both by the tokenizer": adding(WITHOUT_FIRST, "<s> $A </s>"),
}


@pytest.mark.parametrize("case", USABLE)
def test_prompts_are_those_of_the_plain_template(case: str, llm: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    plain = processor_of(llm, tiny_encoder, lambda folder: None)
    processor = processor_of(llm, tiny_encoder, USABLE[case])
    expected = model_inputs(plain, ["What?"], [[PICTURE]])["input_ids"][0].tolist()
    assert expected[0] == processor.tokenizer.bos_token_id and expected.count(expected[0]) == 1
    asked = model_inputs(processor, ["What?"], [[PICTURE]])["input_ids"][0].tolist()
    assert asked == expected
    record = Record("r", (Turn("user", "What?"), Turn("assistant", "A cat.")), (ShownImage("1.png", 0),))
    trained = ConversationEncoder(processor).encode(record)
    assert trained.input_ids[: len(asked)] == asked
    assert processor.tokenizer.decode([i for i in trained.labels if i >= 0]) == "A cat.<|end|>"
    processor.save_pretrained(tmp_path / "saved")
    content = [{"type": "image", "image": PICTURE}, {"type": "text", "text": "What?"}]
    stock = AutoProcessor.from_pretrained(tmp_path / "saved").apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, add_generation_prompt=True
    )
    assert list(stock["input_ids"][0]) == asked
    # As vLLM does: what the template renders, and nothing that the tokenizer adds by itself.
    rendered = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    served = processor.tokenizer(rendered, add_special_tokens=False)["input_ids"]
    image = processor.image_token_id
    assert served == [i for i, before in zip(asked, [None, *asked], strict=False) if not i == before == image]


UNUSABLE = {
    "none named default": (named(a=CHAT_TEMPLATE, b=OTHER), "has chat templates named a, b but none named default"),
    "no template": (lambda llm: (llm / "chat_template.jinja").unlink(), "no chat template: use the instruct version"),
    "a question would end": (adding(WITHOUT_FIRST, "$A </s>"), "adds '</s>' after every text, which would end"),
    "whitespace that is computed": (
        adding("{{ ' ' }}" + CHAT_TEMPLATE, "<s> $A"),
        "writes whitespace before '<s>', so prompts would get two of them",
    ),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_template_that_would_change_prompts_says_what_is_unusual(case: str, llm: Path, tiny_encoder: Path) -> None:
    change, message = UNUSABLE[case]
    with pytest.raises(ConfigError) as error:
        processor_of(llm, tiny_encoder, change)
    assert message in str(error.value) and str(llm) in str(error.value)
