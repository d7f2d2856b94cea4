"""Distillation of any vision-language model of transformers by three facts: decoder layers, image token, width."""

import re

import pytest
import torch
from torch import nn

from tests.distillation.vlms import IMAGE, MODELS, WIDTH, build
from tests.tiny import published_predictors
from visper.config import Head, Position
from visper.distillation import DistilledTask, ModelFacts, Targets, TargetSpec, attach

SPECS = {"depth": TargetSpec(4, 6, (2, 2)), "seg": TargetSpec(4, 5, (2, 2)), "gen": TargetSpec(1, 7)}
TASKS = {
    "depth": DistilledTask(SPECS["depth"], (1, 3), published_predictors()["depth"]),
    "seg": DistilledTask(SPECS["seg"], (2,), published_predictors()["seg"]),
    "gen": DistilledTask(SPECS["gen"], (2,), published_predictors()["gen"]),
}
TASK_IDS = {"depth": [20, 21], "seg": [22, 23], "gen": [24, 25]}


def targets(count):
    generator = torch.Generator().manual_seed(3)
    return {task: torch.randn(count, spec.tokens, spec.width, generator=generator) for task, spec in SPECS.items()}


def terms_of(distiller, model, batch, want=None, **options):
    with distiller.tap() as hidden:
        output = model(**batch)
        terms = distiller(hidden, batch["input_ids"], batch["attention_mask"], want or targets(2), **options)
    return output.loss, terms


@pytest.fixture
def llava():
    model, batch = build("llava")
    return attach(model, TASKS), model, batch


@pytest.mark.parametrize("family", MODELS)
def test_every_family_trains_a_step_with_live_embedding_losses(family):
    model, batch = build(family)
    model.train()
    distiller = attach(model, TASKS)
    inputs = {}
    for layer in (0, 1, 2):  # what goes into the tapped layers 1 to 3

        def keep(module, args, kwargs, layer=layer):
            inputs[layer] = args[0] if args else kwargs["hidden_states"]
            inputs[layer].retain_grad()

        model.get_decoder().layers[layer].register_forward_pre_hook(keep, with_kwargs=True)
    optimizer = torch.optim.AdamW([*model.parameters(), *distiller.parameters()], lr=1e-3)
    loss, terms = terms_of(distiller, model, batch)
    assert len(terms) == 8 and all(term.isfinite() and term > 0 for term in terms.values())
    distiller.total(terms).backward(retain_graph=True)
    for name, parameter in distiller.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name
    for states in inputs.values():
        image = batch["input_ids"] == IMAGE
        assert states.grad.isfinite().all() and (states.grad[image].abs().sum(-1) > 0).all()
    loss.backward()
    before = [p.detach().clone() for p in distiller.parameters()]
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, distiller.parameters(), strict=True))


def test_the_facts_are_read_from_the_model_or_given(llava):
    _, model, batch = llava
    facts = ModelFacts.of(model)
    assert facts == ModelFacts(model.get_decoder(), IMAGE, WIDTH, square_tokens=16)
    given = attach(model, TASKS, facts=facts)
    assert all(term > 0 for term in terms_of(given, model, batch)[1].values())


def test_a_model_that_tells_too_little_is_refused_with_what_is_missing():
    with pytest.raises(ValueError, match=r"Linear has no get_decoder\(\).layers, no config.image_token_id.*ModelFacts"):
        attach(nn.Linear(2, 2), TASKS)


def test_the_model_is_no_part_of_what_is_attached(llava):
    distiller, model, _ = llava
    assert {name.split(".")[0] for name in distiller.state_dict()} == {"objective", "queries"}
    own = {id(p) for p in model.parameters()}
    assert not any(id(p) in own for p in distiller.parameters())


def test_without_task_tokens_only_matrix_tasks_own_queries(llava):
    distiller, model, batch = llava
    assert {task: tuple(q.shape) for task, q in distiller.queries.items()} == {"depth": (4, WIDTH), "seg": (4, WIDTH)}
    with distiller.tap() as hidden, torch.no_grad():
        model(**batch)
        states = hidden[2].clone()
    layout_query = states[0][batch["input_ids"][0] == IMAGE].mean(0)
    seen = []
    distiller.objective.predictors["gen_2"].register_forward_pre_hook(lambda m, args: seen.append(args[1]))
    terms_of(distiller, model, batch)
    torch.testing.assert_close(seen[0][0, 0], layout_query)


def with_task_tokens(batch):
    """The rows of LLaVA with the task tokens behind the image."""
    block = torch.tensor([[token for ids in TASK_IDS.values() for token in ids]]).expand(2, -1)
    at = int((batch["input_ids"][0] == IMAGE).nonzero().max()) + 1
    longer = {
        "input_ids": block,
        "attention_mask": torch.ones_like(block),
        "labels": torch.full_like(block, -100),
    }
    cut = {key: torch.cat((batch[key][:, :at], more, batch[key][:, at:]), 1) for key, more in longer.items()}
    return {**batch, **cut}


def test_task_tokens_learn_through_the_llm_and_are_written_back():
    model, batch = build("llava")
    batch = with_task_tokens(batch)
    plain = model(**batch).logits
    distiller = attach(model, TASKS, task_token_ids=TASK_IDS)
    loss, terms = terms_of(distiller, model, batch)
    loss.backward()
    assert all(q.grad.abs().max() > 0 for q in distiller.task_tokens.queries.values()), "the LLM reads their means"
    assert len(terms) == 8
    hooked = model(**batch).logits
    assert not torch.equal(hooked, plain)
    distiller.write_back(model)
    model.get_input_embeddings()._forward_hooks.clear()
    assert torch.equal(model(**batch).logits, hooked)


def test_tasks_with_and_without_tokens_do_not_mix(llava):
    with pytest.raises(ValueError, match=r"tasks \['seg', 'gen'\] have no task tokens, only \['depth'\] have"):
        attach(llava[1], TASKS, task_token_ids={"depth": [20, 21]})


def test_rows_of_text_add_nothing_and_all_text_reaches_every_parameter(llava):
    distiller, model, batch = llava
    text = torch.full_like(batch["input_ids"][:1], 7)
    mixed = {key: torch.cat((batch[key], text)) for key in ("input_ids", "labels")}
    mixed["attention_mask"] = torch.cat((batch["attention_mask"], torch.ones_like(text)))
    alone = terms_of(distiller, model, batch)[1]
    together = terms_of(distiller, model, {**batch, **mixed})[1]
    for name, term in alone.items():
        # Another batch size takes other kernels: 1e-6 measured.
        torch.testing.assert_close(together[name], term, rtol=1e-5, atol=2e-6)
    only = {"input_ids": text, "attention_mask": torch.ones_like(text), "labels": text}
    _, terms = terms_of(distiller, model, only, targets(0))
    distiller.total(terms).backward()
    assert all(term == 0 for term in terms.values())
    assert all(p.grad is not None and not p.grad.any() for p in distiller.parameters())


def test_micro_batches_with_the_global_count_sum_to_the_whole(llava):
    distiller, model, batch = llava
    whole = terms_of(distiller, model, batch)[1]
    pool = targets(2)
    sums = dict.fromkeys(whole, 0.0)
    for row in (0, 1):
        part = {key: value[row : row + 1] for key, value in batch.items()}
        own = {task: Targets(t[row : row + 1], t, torch.tensor([row])) for task, t in pool.items()}
        terms = terms_of(distiller, model, part, own, num_images=2)[1]
        sums = {name: sums[name] + term for name, term in terms.items()}
    for name, term in whole.items():
        torch.testing.assert_close(sums[name], term, rtol=1e-5, atol=2e-6)


def test_rows_with_several_images_have_a_target_each_or_are_left_out(llava):
    distiller, model, _ = llava
    row = [1, *[IMAGE] * 16, 5, *[IMAGE] * 16, 10, 11]
    ids = torch.tensor([row, [1, *[IMAGE] * 16, *range(10, 29)]])
    several = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.masked_fill(ids == IMAGE, -100)}
    several["pixel_values"] = torch.randn(3, 3, 16, 16)
    with pytest.raises(ValueError, match=r"the targets are \(3, .*expected \(2, .*give one per image"):
        terms_of(distiller, model, several, targets(3))
    for rows in ([0, 0, 1], [0, 1], [1]):
        terms = terms_of(distiller, model, several, targets(len(rows)), image_rows=torch.tensor(rows))[1]
        assert all(term.isfinite() for term in terms.values())


def test_mistakes_say_what_to_do(llava):
    distiller, model, batch = llava
    text = torch.full_like(batch["input_ids"], 7)
    with distiller.tap() as hidden, torch.no_grad():
        model(**batch)
        with pytest.raises(ValueError, match=r"rows \[0\] have no image token \(id 90\)"):
            distiller(hidden, text, None, targets(1), image_rows=torch.tensor([0]))
        with pytest.raises(ValueError, match=r"targets are given, but no row .* has an image token \(id 90\)"):
            distiller(hidden, text, None, targets(2))  # before, zeros
        with pytest.raises(ValueError, match=r"layer 1 has states of .*one image token for each image feature"):
            distiller(hidden, batch["input_ids"][:, 1:], None, targets(2))
    with pytest.raises(ValueError, match=r"no states of layer 1: .*with distiller.tap"):
        distiller({}, batch["input_ids"], None, targets(2))
    with pytest.raises(ValueError, match="the model has layers 1 to 3"):
        attach(model, {"seg": DistilledTask(SPECS["seg"], (4,), published_predictors()["seg"])})


def summed(predicted, target, mask=None):
    """An own loss, which compares whatever torch broadcasts."""
    return (predicted - target).abs().mean((1, 2))


@pytest.mark.parametrize("shape", [(2, 1, 6), (2, 4, 1), (2, 9, 6), (2, 6, 2, 2), (2, 6)])
@pytest.mark.parametrize("at", ["task_tokens", "image_tokens"])
def test_targets_of_another_shape_are_refused_whatever_the_loss(shape, at):
    model, batch = build("llava")
    head = {"kind": "resampler" if at == "task_tokens" else "linear"}
    task = DistilledTask(SPECS["depth"], [1], head, at=at, loss={f"{__name__}:summed": 1.0})
    with pytest.raises(ValueError, match=rf"the targets are {re.escape(str(shape))}, expected \(2, 4, 6\)"):
        terms_of(attach(model, {"depth": task}), model, batch, {"depth": torch.zeros(shape)})


def test_rows_and_counts_may_be_lists(llava):
    distiller, model, batch = llava
    expected = terms_of(distiller, model, batch)[1]
    assert terms_of(distiller, model, batch, image_rows=[0, 1], image_tokens=[16, 16])[1] == expected
    assert terms_of(distiller, model, batch, image_rows=torch.tensor([0, 1], dtype=torch.int32))[1] == expected
    with pytest.raises(ValueError, match="list images in row order"):
        terms_of(distiller, model, batch, image_rows=[1, 0])
    with pytest.raises(ValueError, match=r"rows \[2\] have no image token"):
        terms_of(distiller, model, batch, image_rows=[0, 2])


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (torch.rand(31, 2), r"places are \(31, 2\), expected \(32, 2\)"),
        (torch.rand(32, 2) * 336, "divide pixels by the image's width and height"),
    ],
)
def test_places_that_are_no_points_of_the_image_are_refused(llava, places, message):
    _, model, batch = llava
    distiller = attach(model, {"seg": DistilledTask(SPECS["seg"], (2,), {"kind": "linear"}, at="image_tokens")})
    with pytest.raises(ValueError, match=message):
        terms_of(distiller, model, batch, {"seg": targets(2)["seg"]}, places=places)


@pytest.mark.parametrize(
    "wrong",
    [
        {"head": "linear"},
        {"head": {"kind": "lineer"}},
        {"loss": {"mse": -1.0}},
        {"own": "encodr"},
        {"end": 0},
        {"at": "image_token"},
        {"layers": 3},
        {"weight": -0.5},
        {"wieght": 0.1},
    ],
)
def test_a_task_has_only_values_that_a_recipe_may_have(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DistilledTask(**{"target": SPECS["seg"], "layers": (2,), **wrong})


def test_a_last_layer_without_final_norm_is_refused_when_attached(llava):
    model = llava[1]
    model.get_decoder().last = model.get_decoder().norm
    del model.get_decoder().norm
    with pytest.raises(ValueError, match=r"layer 3 is the last .* has no final norm named"):
        attach(model, TASKS)


def test_tokens_that_are_not_known_to_be_a_square_need_places():
    task = DistilledTask(SPECS["seg"], (2,), Head(kind="linear"), at=Position.IMAGE_TOKENS, loss={"cosine": 1.0})
    for family, model_square in (("llava", 16), ("gemma3", 4), ("qwen3_vl", None), ("internvl", None)):
        model, batch = build(family)
        want = {"seg": targets(2)["seg"]}
        distiller = attach(model, {"seg": task})
        assert distiller.square_tokens == model_square
        if model_square:
            assert terms_of(distiller, model, batch, want)[1]["seg/2/cosine"] > 0
            distiller.square_tokens = 36  # crops of Gemma 3 have more tokens than one square
        with pytest.raises(ValueError, match="is unknown: give 'places'"):
            terms_of(distiller, model, batch, want)
        count = int((batch["input_ids"] == IMAGE).sum())
        places = torch.rand(count, 2, generator=torch.Generator().manual_seed(0))
        assert terms_of(distiller, model, batch, want, places=places)[1]["seg/2/cosine"] > 0
