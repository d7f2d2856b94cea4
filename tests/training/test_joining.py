"""Joined conversations through real models and runs: the losses and gradients of the separate rows."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

from tests import tiny
from tests.logs import computed
from tests.training.test_attention import IMAGE, model_of
from visper.common.errors import ConfigError
from visper.config import Run
from visper.data.collator import Collator, Sample
from visper.data.joining import JoiningCollator, join
from visper.training import run_stage
from visper.training.attention import forwarding, packing_arguments, require_joinable, separate_samples
from visper.training.module import FORWARD_KEYS, PACKING_KEYS
from visper.training.row_attention import Joined, RowMask, sample_sdpa

FAMILIES = ("llama", "phi3", "qwen3", "gemma3")
SEPARATE, JOINING = Collator(0), JoiningCollator(Collator(0), IMAGE, 200)


def samples():
    """Three conversations about one image, one of text, two about another, one alone; all longer than a window of 6."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for name, image, lengths in (("a", 1, (5, 9, 3)), ("text", None, (8,)), ("b", 2, (2, 7)), ("c", 3, (4,))):
        pixels = None if image is None else torch.randn(1, 3, 8, 8, generator=generator)
        prefix = [1, 2] if image is None else [1, IMAGE, IMAGE, IMAGE, IMAGE, 2, 3]
        for length in lengths:
            rest = torch.randint(4, 60, (length,), generator=generator).tolist()
            labels = [-100] * (len(prefix) + 1) + rest[1:]
            found.append(Sample(name, prefix + rest, labels, () if image is None else (4,), pixels))
    return found


def step(model, collator):
    batch = collator(samples())
    model.zero_grad()
    output = model(**{k: batch[k] for k in FORWARD_KEYS if k in batch}, num_tokens=31)
    output["loss"].backward()
    return output["loss"].detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def states(model, batch):
    """The last hidden state of every token, ``[rows, L, D]``."""
    borders = {name: batch[name] for name in PACKING_KEYS & batch.keys()}
    llm = model.student.model.language_model
    given = packing_arguments(llm, borders.pop("position_ids", None), borders)
    pixels = batch.get("pixel_values")
    with torch.no_grad(), forwarding(llm, given):
        return model.student.model(input_ids=batch["input_ids"], pixel_values=pixels, use_cache=False)[0]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_joined_rows_give_the_losses_and_gradients_of_separate_ones(family, recompute):
    model = model_of(family)
    if recompute:
        model.recompute_activations()
    loss, gradients = step(model, SEPARATE)
    separate_samples(model.student.model.language_model)
    joined_loss, joined_gradients = step(model, JOINING)
    assert JOINING(samples())["input_ids"].numel() < sum(len(sample.input_ids) for sample in samples()) - 20
    # Another order of summing: 1e-7 seen in the loss, 4e-7 in gradients of up to 0.3.
    torch.testing.assert_close(joined_loss, loss, rtol=1e-6, atol=0)
    assert joined_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(joined_gradients[name], gradient, rtol=1e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_has_the_state_it_has_in_its_own_row(family):
    model = model_of(family).eval()
    alone = iter([states(model, SEPARATE([sample]))[0] for sample in samples()])
    separate_samples(model.student.model.language_model)
    assert_states_of(states(model, JOINING(samples()))[0], alone)


def assert_states_of(row, alone):
    """The joined row's states against those of the rows one by one."""
    at = 0
    for joined in join(samples(), IMAGE, 200):
        members = [next(alone) for _ in joined.members]
        expected = torch.cat([members[0][: joined.prefix], *(member[joined.prefix :] for member in members)])
        torch.testing.assert_close(row[at : at + len(expected)], expected, rtol=1e-4, atol=1e-5)
        at += len(expected)
    assert at == len(row)


def test_tokens_see_the_prefix_and_their_own_branch_by_hand():
    joined = Joined(
        samples=torch.tensor([0, 0, 0, 0, 0, 1, 1]),
        branches=torch.tensor([0, 0, 1, 1, 2, 0, 0]),
        positions=torch.tensor([0, 1, 2, 3, 2, 0, 1]),
    )
    expected = [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1, 1],
    ]
    tokens = torch.arange(7)
    assert joined.sees(tokens[:, None], tokens).int().tolist() == expected
    one, other = joined.row_samples([5, 2], [2, 2])
    assert one.distance is not None and one.distance.tolist() == [
        [2, 1, 0, -1, -1],
        [3, 2, 1, 0, -1],
        [2, 1, -1, -1, 0],
    ]
    assert (other.length, other.prefix, other.distance) == (2, 2, None)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_block_mask_of_flex_attention_is_the_dense_one():
    batch = JOINING(samples())
    lengths = batch["cu_seq_lens_q"].diff()
    numbers = torch.arange(len(lengths)).repeat_interleave(lengths)
    joined = Joined(numbers, batch["branches"][0], batch["position_ids"][0])
    query, key, value = torch.randn(3, 1, 2, len(numbers), 16, generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(len(numbers))
    dense = F.scaled_dot_product_attention(query, key, value, joined.sees(tokens[:, None], tokens))
    by_blocks = flex_attention(query, key, value, block_mask=joined.block_mask())
    rows = joined.row_samples(batch["lengths"], batch["prefixes"])
    by_sample, _ = sample_sdpa(torch.nn.Module(), query, key, value, RowMask(rows))
    torch.testing.assert_close(by_blocks, dense)
    torch.testing.assert_close(by_sample.transpose(1, 2), dense)


@pytest.mark.slow  # flex attention is compiled
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for the CPU needs a C++ compiler")
def test_flex_attention_through_a_model():
    model = model_of("llama").eval()
    alone = iter([states(model, SEPARATE([sample]))[0] for sample in samples()])
    model.student.model.language_model.set_attn_implementation("flex_attention")
    assert_states_of(states(model, JOINING(samples()))[0], alone)


def test_attention_that_cannot_separate_branches_is_refused():
    llm = model_of("llama", "eager").student.model.language_model
    with pytest.raises(ConfigError, match="attention 'eager'"):
        require_joinable(llm)
    windowed = SimpleNamespace(config=SimpleNamespace(_attn_implementation="flex_attention", sliding_window=6))
    with pytest.raises(ConfigError, match="sliding window"):
        require_joinable(windowed)


@pytest.fixture
def make(tmp_path, tiny_llm, tiny_encoder):
    """Settings of a run over 12 conversations about 5 images and 4 of text: two steps an epoch, three epochs."""
    folder = tiny.write_rows(tmp_path / "rows")
    rows = json.loads((folder / "rows.json").read_text())
    for number, row in enumerate(rows[:12]):
        row["image"] = f"{min(number % 6, 4)}.png"
        row["conversations"][1]["value"] += f" {number}"
    (folder / "rows.json").write_text(json.dumps(rows))

    def build(name, micro_batch, joined=True, **optimization):
        settings = {
            "name": "joined",
            "stage": "ift",
            "output": str(tmp_path / name),
            "student": {"llm": str(tiny_llm), "encoder": str(tiny_encoder)},
            "data": {
                "sources": [{"json": str(folder / "rows.json"), "images": str(folder / "images")}],
                "workers": 0,
                "join_conversations": joined,
            },
            "optimization": {
                "global_batch": 8,
                "micro_batch": micro_batch,
                "lr": 1e-3,
                "epochs": 3,
                "precision": "float32",
                **optimization,
            },
            "logging": {"every": 1, "save_every": 2},
        }
        return Run.model_validate(settings)

    return build


def test_a_joined_run_has_the_losses_of_separate_conversations(make, tmp_path, capsys):
    """In micro-batches of one conversation nothing is joined, and each step holds the same conversations."""
    run_stage(make("alone", 1))
    assert "12 conversations about an image share 12 images" in " ".join(capsys.readouterr().out.split())
    run_stage(make("joined", 8))
    shared = re.search(r"12 conversations about an image share (\d+) images", " ".join(capsys.readouterr().out.split()))
    assert shared is not None and int(shared[1]) <= 7
    alone, joined = computed(tmp_path / "alone"), computed(tmp_path / "joined")
    assert len(alone) == len(joined) == 6
    for one, other in zip(alone, joined, strict=True):
        assert other == pytest.approx(one, rel=1e-5)


def test_a_joined_run_resumes_exactly_and_in_other_micro_batches(make, tmp_path, capsys):
    run_stage(make("whole", 4))
    expected = computed(tmp_path / "whole")
    for name, micro_batch in (("same", 4), ("other", 8)):
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        shutil.rmtree(tmp_path / name / "model")
        shutil.rmtree(tmp_path / name / "checkpoints" / "checkpoint-6")
        run_stage(make(name, micro_batch), resume=True)
        assert "checkpoint-4" in capsys.readouterr().out
        found = computed(tmp_path / name)
        for one, other in zip(expected, found, strict=True):
            assert other == (one if name == "same" else pytest.approx(one, rel=1e-5))


def test_distillation_with_joined_conversations_is_refused(make):
    settings = make("refused", 4).model_dump(mode="json", by_alias=True)
    with pytest.raises(ValueError, match=r"joining is not supported with distillation: set data.join_conversations"):
        Run.model_validate({**settings, "stage": "pt", "distillation": tiny.distillation()})
    with pytest.raises(ValueError, match=r"not supported with optimization.attention=flash_attention_2"):
        make("refused", 4, attention="flash_attention_2")
