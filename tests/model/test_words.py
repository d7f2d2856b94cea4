"""Added words: one token each, found as words only, with trainable embeddings in PT, usable without visper."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests import tiny
from tests.data.checks.test_unknown_words import save_quickstart_llm
from tests.data.test_chat import record
from tools.quickstart_bases.vocabulary import new_tokenizer
from visper.common.errors import ConfigError
from visper.config import Geometry, Run
from visper.config import Student as StudentConfig
from visper.data.chat import IGNORED, ConversationEncoder
from visper.model import AddedWords, build_skeleton, build_student, load_student, save_student
from visper.model.student import STUDENT_FILE, read_added_tokens
from visper.model.words import SPREAD, add_words
from visper.training import TrainingModel, run_stage

WORDS = ("zebra", "teal", "hexagon", "café", "cat")


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module")
def quickstart_llm(tmp_path_factory):
    return save_quickstart_llm(tmp_path_factory.mktemp("quickstart"))


@pytest.fixture
def config(quickstart_llm, tiny_encoder):
    return StudentConfig(llm=str(quickstart_llm), encoder=str(tiny_encoder), add_words=(*WORDS, "red"))


def test_each_word_becomes_one_token_and_known_ones_stay_as_they_are():
    tokenizer = new_tokenizer()
    size, red = len(tokenizer), tokenizer.convert_tokens_to_ids("red")
    added = add_words(tokenizer, (*WORDS, "red", "red sphere"))
    assert added == list(range(size, size + len(WORDS)))
    assert [ids_of(tokenizer, word) for word in WORDS] == [[token] for token in added]
    known = [tokenizer.convert_tokens_to_ids(word) for word in ("a", ",", ".")]
    assert ids_of(tokenizer, "a zebra , red café .") == [known[0], added[0], known[1], red, added[3], known[2]]
    assert tokenizer.convert_tokens_to_ids("red") == red
    assert not any(tokenizer.added_tokens_decoder[token].special for token in added)


@pytest.mark.parametrize("text", ["catalog", "concat", "cat_1", "cats", "cat2"])
def test_a_word_is_not_found_inside_another(text):
    tokenizer = new_tokenizer()
    (cat,) = add_words(tokenizer, ["cat"])
    assert ids_of(tokenizer, text) == [tokenizer.unk_token_id]
    assert ids_of(tokenizer, f"a cat ? {text}").count(cat) == 1


def test_words_are_found_as_the_tokenizer_normalizes_texts():
    inner = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    inner.normalizer, inner.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    (zebra,) = add_words(tokenizer, ["Zebra"])
    assert ids_of(tokenizer, "A zebra. ZEBRA!") == [1, zebra, 0, zebra, 0]


def test_byte_level_tokenizers_read_and_write_added_words():
    tokenizer = tiny.byte_tokenizer()
    (zebra,) = add_words(tokenizer, ["zebra"])
    ids = ids_of(tokenizer, "a zebra, zebras")
    assert ids.count(zebra) == 1 and tokenizer.decode(ids) == "a zebra, zebras"


def test_a_word_that_the_tokenizer_would_not_write_as_it_was_read_is_refused():
    with pytest.raises(ConfigError, match=r"'café café' as .* and decodes it to '.*', so the word cannot be added"):
        add_words(tiny.byte_tokenizer(), ["café"])  # a byte-level decoder takes an added é for a byte


def test_names_of_the_students_own_tokens_are_refused(config):
    with pytest.raises(ConfigError, match=r"add_words names \['<image>'\]"):
        build_student(config.model_copy(update={"add_words": ("<image>",)}), Geometry.SQUASH)


def test_words_of_a_file_become_the_runs(tmp_path, quickstart_llm):
    (tmp_path / "words.txt").write_text("\ufeffzebra\n\n  teal hexagon \nzebra\n", encoding="utf-8")
    parts = {"llm": str(quickstart_llm), "encoder": "e"}
    config = StudentConfig(**parts, add_words=str(tmp_path / "words.txt"))
    assert config.add_words == ("zebra", "teal hexagon") and StudentConfig(**config.model_dump()) == config
    with pytest.raises(ValueError, match=r"cannot read words from 'zebra'.*give a list, or a UTF-8 text file"):
        StudentConfig(**parts, add_words="zebra")
    with pytest.raises(ValueError, match="' zebra' is not a word"):
        StudentConfig(**parts, add_words=[" zebra"])


@pytest.mark.parametrize("spare", [0, 100])
def test_rows_of_words_start_around_the_mean_and_may_be_answers(spare, config, quickstart_llm, tmp_path):
    """Also where the LLM has rows beyond its tokenizer's entries."""
    from transformers import LlamaForCausalLM

    llm = LlamaForCausalLM.from_pretrained(quickstart_llm)
    old = llm.config.vocab_size + spare
    llm.resize_token_embeddings(old, mean_resizing=False)
    llm.save_pretrained(tmp_path / "llm")
    AutoTokenizer.from_pretrained(quickstart_llm).save_pretrained(tmp_path / "llm")
    config = config.model_copy(update={"llm": str(tmp_path / "llm")})
    student = build_student(config, Geometry.SQUASH)
    assert len(student.word_ids) == len(WORDS)
    for table, before in (
        (student.model.get_input_embeddings().weight, llm.model.embed_tokens.weight),
        (student.model.lm_head.weight, llm.lm_head.weight),
    ):
        mean, deviation = before[:old].mean(0), before[:old].std(0)
        first = min(student.word_ids)
        assert torch.equal(table[:first], before[:first])
        moved = (table[student.word_ids] - mean) / deviation
        # Of 5 x 16 values or more, so that their deviation is known to some 8 %.
        assert 0.7 * SPREAD < moved.std() < 1.3 * SPREAD
    assert not {*student.word_ids} & {*student.model.generation_config.suppress_tokens, *student.silent_ids}
    skeleton = build_skeleton(config)
    assert (skeleton.word_ids, skeleton.image_token_id, skeleton.task_token_ids) == (
        student.word_ids,
        student.image_token_id,
        student.task_token_ids,
    )
    assert [p.shape for p in skeleton.model.parameters()] == [p.shape for p in student.model.parameters()]


def test_a_hidden_state_is_told_which_added_word_is_right(config):
    """With equal rows in the output layer its gradient was the same for every word, and no answer was ever learned."""
    student = build_student(config, Geometry.SQUASH)
    head = student.model.get_output_embeddings()
    gradients = []
    for word in student.word_ids:
        state = torch.zeros(1, student.hidden_size, requires_grad=True)
        torch.nn.functional.cross_entropy(head(state), torch.tensor([word])).backward()
        gradients.append(state.grad[0])
    apart = torch.pdist(torch.stack(gradients))
    assert apart.min() > SPREAD * head.weight.std()  # rows of width D are some sqrt(2 D) SPREADs apart


def test_labels_of_added_words_are_their_tokens(config):
    student = build_student(config, Geometry.SQUASH)
    encoder = ConversationEncoder(student.processor)
    encoded = encoder.encode(record("What zebra ?", "a teal hexagon , catalog", image_turn=None))
    assert (encoded.num_text, encoded.num_unknown) == (5, 1)
    labels = [label for label in encoded.labels if label != IGNORED]
    teal, hexagon = (student.word_ids[WORDS.index(word)] for word in ("teal", "hexagon"))
    assert labels[1:3] == [teal, hexagon]
    assert student.processor.tokenizer.decode(labels[:4]) == "a teal hexagon ,"


@pytest.mark.parametrize("tied", [False, True])
def test_the_rows_written_back_equal_the_hooks(tied, tmp_path, tiny_encoder):
    llm = tiny.save_llm(tmp_path / "llm", tied=tied)
    student = build_student(
        StudentConfig(llm=str(llm), encoder=str(tiny_encoder), add_words=("zebra", "teal")), Geometry.SQUASH
    )
    tables = student.model.get_input_embeddings(), student.model.get_output_embeddings()
    words = AddedWords(student.word_ids, *tables)
    assert len(list(words.parameters())) == (1 if tied else 2)
    ids = torch.tensor([[5, *student.word_ids, 7]])
    plain = student.model(input_ids=ids).logits
    words.attach(*tables)
    torch.testing.assert_close(student.model(input_ids=ids).logits, plain, rtol=0, atol=1e-6)
    with torch.no_grad():
        for parameter in words.parameters():
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    hooked = student.model(input_ids=ids).logits
    words.write_back(*tables)
    for table in tables:
        table._forward_hooks.clear()
    written = student.model(input_ids=ids).logits
    torch.testing.assert_close(written, hooked, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(written, plain)


def test_the_loss_scores_added_words_by_their_trained_rows(tmp_path, tiny_encoder, monkeypatch):
    llm = tiny.save_llm(tmp_path / "llm")
    config = StudentConfig(llm=str(llm), encoder=str(tiny_encoder), add_words=("zebra", "teal"))
    student = build_student(config, Geometry.SQUASH)
    tables = student.model.get_input_embeddings(), student.model.get_output_embeddings()
    words = AddedWords(student.word_ids, *tables)
    with torch.no_grad():
        words.head_rows += 1
    model = TrainingModel(student, words=words)
    labels = torch.tensor([[5, *student.word_ids, 7]])
    states = torch.randn(1, 4, student.hidden_size, generator=torch.Generator().manual_seed(0))
    weight = tables[1].weight.detach().clone()
    weight[student.word_ids] += 1
    logits = (states[0, :-1] @ weight.T).index_fill_(1, model.silent_ids, float("-inf"))
    expected = torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum")
    for at_once in (2048, 2):
        monkeypatch.setattr("visper.training.next_token.LOGIT_ROWS", at_once)
        torch.testing.assert_close(model.next_token_loss(states, labels), expected, rtol=1e-6, atol=1e-6)


@pytest.fixture
def make(config, tmp_path):
    """Two runs: PT of a student with added words, and the IFT that starts from it."""
    folder = tiny.write_rows(tmp_path / "rows", images=8, text_rows=0)
    rows = json.loads((folder / "rows.json").read_text())
    for row in rows:
        row["conversations"][1]["value"] = "a zebra"
    (folder / "rows.json").write_text(json.dumps(rows))

    def build(stage, **changes):
        return Run.model_validate(
            {
                "name": stage,
                "stage": stage,
                "output": str(tmp_path / stage),
                "data": {"sources": [{"json": str(folder / "rows.json"), "images": str(folder / "images")}]},
                "optimization": {"global_batch": 4, "micro_batch": 2, "lr": 1e-3, "max_steps": 2},
                **changes,
            }
        )

    return build


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_pt_trains_added_words_and_nothing_else_of_the_llm_and_ift_goes_on(precision, make, config, tmp_path):
    settings = {"global_batch": 4, "micro_batch": 2, "lr": 1e-2, "max_steps": 2, "precision": precision}
    start = build_student(config, Geometry.SQUASH)
    run_stage(make("pt", student=config.model_dump(), optimization=settings))
    after = load_student(tmp_path / "pt")
    assert after.word_ids == start.word_ids
    zebra, teal = start.word_ids[:2]
    others = [i for i in range(start.image_token_id) if i not in start.word_ids]
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    for name in ("get_input_embeddings", "get_output_embeddings"):
        old, new = (getattr(s.model, name)().weight for s in (start, after))
        assert not torch.equal(new[zebra], old[zebra]), "an answer of every row"
        assert torch.equal(new[others], old[others].to(dtype).float())
    assert torch.equal(after.model.get_input_embeddings().weight[teal], old_row(start, teal, dtype)), "in no row"
    run_stage(make("ift", start_from=str(tmp_path / "pt"), optimization=settings))
    later = load_student(tmp_path / "ift")
    assert later.word_ids == start.word_ids
    assert not torch.equal(later.model.lm_head.weight[zebra], after.model.lm_head.weight[zebra])


@pytest.mark.slow
def test_a_resumed_pt_has_the_words_of_one_that_was_never_stopped(make, tiny_encoder, tmp_path):
    """On a tied LLM, whose words have one table of rows."""
    llm = tiny.save_llm(tmp_path / "llm", tied=True)
    parts = {"llm": str(llm), "encoder": str(tiny_encoder), "add_words": ["zebra"]}
    run = make("pt", student=parts, logging={"save_every": 1})
    run_stage(run)
    once = load_student(tmp_path / "pt")
    shutil.rmtree(tmp_path / "pt" / "model")
    shutil.rmtree(tmp_path / "pt" / "checkpoints" / "checkpoint-2")
    run_stage(run, resume=True)
    again = load_student(tmp_path / "pt")
    for student in (once, again):
        assert student.model.lm_head.weight is student.model.get_input_embeddings().weight
    assert torch.equal(*(student.model.lm_head.weight[student.word_ids] for student in (once, again)))
    start = build_student(StudentConfig(**parts), Geometry.SQUASH)
    assert not torch.equal(start.model.lm_head.weight[start.word_ids], once.model.lm_head.weight[once.word_ids])


def old_row(student, token, dtype):
    return student.model.get_input_embeddings().weight[token].to(dtype).float()


def test_frozen_words_stay_as_they_are_in_pt(make, config, tmp_path):
    settings = {"global_batch": 4, "micro_batch": 4, "lr": 1e-2, "max_steps": 1, "freeze": ["words"]}
    settings["precision"] = "float32"
    run_stage(make("pt", student=config.model_dump(), optimization=settings))
    start, after = build_student(config, Geometry.SQUASH), load_student(tmp_path / "pt")
    ids = start.word_ids
    assert torch.equal(after.model.lm_head.weight[ids], start.model.lm_head.weight[ids])


@pytest.mark.slow
def test_a_saved_folder_reads_and_writes_added_words_without_this_package(config, tmp_path):
    student = build_student(config, Geometry.SQUASH)
    save_student(student, tmp_path / "model")
    text = "a teal hexagon , zebra"
    torch.save(ids_of(student.processor.tokenizer, text), tmp_path / "ids.pt")
    code = f"""
import sys, torch
from transformers import AutoProcessor, LlavaForConditionalGeneration
model = LlavaForConditionalGeneration.from_pretrained({str(tmp_path / "model")!r})
tokenizer = AutoProcessor.from_pretrained({str(tmp_path / "model")!r}).tokenizer
ids = tokenizer({text!r}, add_special_tokens=False)["input_ids"]
assert ids == torch.load({str(tmp_path / "ids.pt")!r}) and tokenizer.unk_token_id not in ids
assert tokenizer.unk_token_id in tokenizer("catalog")["input_ids"]
assert tokenizer.decode(ids, skip_special_tokens=True) == {text!r}
assert model.lm_head.weight.shape[0] >= len(tokenizer) and not set(ids) & set(model.generation_config.suppress_tokens)
assert "visper" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_folder_without_the_ids_of_added_words_says_what_is_missing(tmp_path):
    (tmp_path / STUDENT_FILE).write_text('{"task_tokens": {}}')
    with pytest.raises(ConfigError, match=r"student.json' has no word_ids.*train the stage again"):
        read_added_tokens(str(tmp_path))
