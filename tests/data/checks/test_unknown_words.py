"""Words that the tokenizer does not know are counted exactly; the limit warns or refuses."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlavaProcessor, PreTrainedTokenizerFast
from typer.testing import CliRunner

from tests.data.rows.test_records import row
from tests.data.test_chat import CHATML, make_processor, record
from tests.records import check_file
from tools.quickstart_bases.vocabulary import new_tokenizer
from visper.cli import app
from visper.common.errors import DataError
from visper.config import Run
from visper.data.chat import ConversationEncoder
from visper.data.chat_template import student_template
from visper.data.checks.report import TOTAL
from visper.data.checks.unknown_words import UnknownWords
from visper.data.images import build_image_processor
from visper.training import run_stage

ANSWERS = ("a teal hexagon", "two zebras graze", "mostly cloudy", "an umbrella", "a red sphere")
"""12 tokens with the quickstart's tokenizer, of which it knows "a", "a" and "red sphere"."""
NUM_TEXT, NUM_UNKNOWN = 12, 9


def processor_of(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    return LlavaProcessor(
        image_processor=build_image_processor("squash", 8, [0.5] * 3, [0.5] * 3),
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=student_template(str(tokenizer.chat_template), "<image>", []),
    )


def save_quickstart_llm(folder: Path) -> Path:
    """The quickstart's tokenizer under a random Llama."""
    tokenizer = new_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes["max_position_embeddings"] = 4096
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Five rows without images; the questions' unknown words do not count."""
    (tmp_path / "rows.json").write_text(json.dumps([row("Describe zebras ?", answer) for answer in ANSWERS]))
    return tmp_path / "rows.json"


def test_the_share_is_that_of_supervised_text(rows: Path) -> None:
    report = check_file(rows, rows.parent, ConversationEncoder(processor_of(new_tokenizer()), 500))
    assert (report.unknown.num_text, report.unknown.num_unknown) == (NUM_TEXT, NUM_UNKNOWN)
    assert (report.counts[TOTAL]["answer tokens"], report.counts[TOTAL]["unknown tokens"]) == (NUM_TEXT, NUM_UNKNOWN)
    found = ["teal", "hexagon", "two", "zebras", "graze", "mostly", "cloudy", "an", "umbrella"]
    assert report.content()["unknown words"]["words"] == found
    assert report.content()["unknown words"]["share"] == NUM_UNKNOWN / NUM_TEXT


def test_what_is_cut_does_not_count() -> None:
    encoder = ConversationEncoder(processor_of(new_tokenizer()))
    whole = encoder.encode(record("What ?", "a zebra zebra zebra", image_turn=None))
    assert (whole.num_text, whole.num_unknown) == (4, 3)
    encoder.max_tokens = len(whole.input_ids) - 2  # the end of the turn and a word
    cut = encoder.encode(record("What ?", "a zebra zebra zebra", image_turn=None))
    assert (cut.num_text, cut.num_unknown) == (3, 2)


def test_byte_level_tokenizers_know_every_text_whatever_they_call_unknown() -> None:
    processor = make_processor(CHATML)
    processor.tokenizer.unk_token = "<|im_end|>"  # as GPT-2's tokenizer names its end-of-text token
    encoded = ConversationEncoder(processor).encode(record("What?", "Zebras grasen: 斑马", image_turn=None))
    assert (encoded.num_text, encoded.num_unknown) == (0, 0)


def test_unigram_models_have_their_unknown_token_counted() -> None:
    pieces = [("<unk>", 0.0), *((piece, -1.0) for piece in ("▁a", "▁cat", "▁what"))]
    inner = Tokenizer(models.Unigram(pieces, unk_id=0))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="<|end|>")
    tokenizer.add_tokens(["<|end|>"], special_tokens=True)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}"
    encoder = ConversationEncoder(processor_of(tokenizer))
    encoded = encoder.encode(record("what", "a cat a zébra", image_turn=None))
    assert encoded.num_unknown == 1 and encoder.unknown_words(record("what", "a zébra", image_turn=None)) == ["zébra"]


@pytest.mark.parametrize(("unknown", "limit", "said"), [(1, 0.2, None), (2, 0.2, "2.0%"), (30, 0.3, "30.0%")])
def test_past_one_percent_it_is_said(unknown: int, limit: float, said: str | None) -> None:
    warning = UnknownWords(100, unknown, ("zebra",)).check(limit)
    assert warning is None if said is None else said in str(warning) and "student.add_words" in str(warning)


def test_past_the_limit_it_is_refused_with_share_examples_and_remedy() -> None:
    with pytest.raises(DataError, match=r"21\.0% .*'zebra'.*data\.unknown_limit allows 20\.0%.*student\.add_words"):
        UnknownWords(100, 21, ("zebra",)).check(0.2)


@pytest.fixture
def settings(rows: Path, tiny_encoder: Path, tmp_path: Path) -> dict:
    llm = save_quickstart_llm(tmp_path / "llm")
    return {
        "name": "own",
        "stage": "ift",
        "output": str(tmp_path / "own"),
        "student": {"llm": str(llm), "encoder": str(tiny_encoder)},
        "data": {"sources": [{"json": str(rows), "images": str(rows.parent)}], "workers": 0},
        "optimization": {"global_batch": 2, "micro_batch": 2, "lr": 1e-3, "max_steps": 1, "precision": "float32"},
    }


def test_a_run_is_refused_unless_its_recipe_allows_it(settings: dict, capsys) -> None:
    with pytest.raises(DataError, match=r"75\.0% of the supervised text .*9 of 12 tokens.*'teal', 'hexagon'"):
        run_stage(Run.model_validate(settings))
    settings["data"]["unknown_limit"] = 0.8
    settings["output"] += "-allowed"
    run_stage(Run.model_validate(settings))
    said = " ".join(capsys.readouterr().out.split())
    assert "warning 75.0% of the supervised text" in said


def test_data_check_says_it_and_ends_as_the_run_would(settings: dict, rows: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    command = ["data", "check", str(rows), "--images", str(rows.parent), "--run", str(tmp_path / "run.yaml")]
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code != 0 and isinstance(refused.exception, DataError)
    allowed = CliRunner().invoke(app, [*command, "--set", "data.unknown_limit=1"])
    assert allowed.exit_code == 0 and "75.0% of the supervised text (9 of 12 tokens)" in " ".join(
        allowed.output.split()
    )
