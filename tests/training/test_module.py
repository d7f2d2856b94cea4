"""The training model: logits where labels are, batches without labels or images, teachers left outside."""

from types import SimpleNamespace

import pytest
import torch

from tests.tiny import published_predictors
from visper.config import Geometry, Lora
from visper.config import Student as StudentConfig
from visper.distillation import DistilledTask, EmbeddingDistillation, Targets, TargetSpec
from visper.model import TaskTokens, build_student, initial_queries
from visper.training import TrainingModel, apply_stage
from visper.training.compilation import compile_parts
from visper.training.lora import add_updates
from visper.training.stages import DISTILLATION_PARTS, TASK_TOKEN_PARTS, part_name

TOKENS, WIDTH = 16, 8


@pytest.fixture
def model(tiny_llm, tiny_encoder):
    student = build_student(StudentConfig(llm=str(tiny_llm), encoder=str(tiny_encoder)), Geometry.SQUASH)
    queries = initial_queries(student, {"depth": TOKENS}, torch.Generator().manual_seed(0))
    task = DistilledTask(TargetSpec(TOKENS, WIDTH, (4, 4)), (2,), published_predictors()["depth"])
    objective = EmbeddingDistillation({"depth": task}, student.hidden_size, student.num_layers)
    built = TrainingModel(student, TaskTokens(student.task_token_ids, queries), objective)
    apply_stage(built, "pt")
    return built


def batch_of(model, images=2, text=1):
    """Rows of one length: an image block and text; the last five tokens are supervised."""
    image_id, task_ids = model.image_token_id, model.task_token_ids
    block = [image_id] * 16 + [token for ids in task_ids.values() for token in ids]
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(0, 200, (images + text, len(block) + 12), generator=generator)
    for row in range(images):
        words[row, 3 : 3 + len(block)] = torch.tensor(block)
    labels = torch.full_like(words, -100)
    labels[:, -5:] = words[:, -5:]
    batch = {"input_ids": words, "attention_mask": torch.ones_like(words), "labels": labels}
    batch |= {"num_tokens": 5 * (images + text), "num_images": max(1, images), "image_rows": torch.arange(images)}
    if images:
        batch["pixel_values"] = torch.randn(images, 3, 16, 16, generator=generator)
        own = torch.randn(images, TOKENS, WIDTH, generator=generator)
        batch["targets"] = {"depth": Targets(own, own, torch.arange(images))}
    return batch


def gradients(model, batch):
    model.zero_grad()
    model(**batch)["loss"].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_logits_exist_at_supervised_positions_only(model):
    seen = []
    model.student.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    model(**batch_of(model))
    assert seen == [(3 * 5, 32)], "the published code computes them at every position"


def test_the_loss_is_stock_llavas_up_to_silent_tokens(model):
    batch = batch_of(model, images=0, text=2)
    ours = model(**batch)["ntp"]
    with torch.no_grad():
        logits = model.student(input_ids=batch["input_ids"]).logits[:, :-1].float()
        logits[..., model.silent_ids] = float("-inf")
        theirs = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_logits_in_parts_give_the_same_loss_and_gradients(model, monkeypatch, fused, tied):
    if fused and not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip("torch 2.15 brings it")
    if not fused:
        monkeypatch.setattr("visper.training.next_token.can_fuse", lambda *_: False)
    if tied:
        model.student.lm_head.weight = model.student.get_input_embeddings().weight
    apply_stage(model, "ift", lacks=("task_tokens.*",))
    batch = batch_of(model)
    whole, expected = model(**batch)["ntp"], gradients(model, batch)
    monkeypatch.setattr("visper.training.next_token.LOGIT_ROWS", 4)
    torch.testing.assert_close(model(**batch)["ntp"], whole, rtol=1e-6, atol=0)
    for name, gradient in gradients(model, batch).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_recomputing_activations_changes_no_loss_and_no_gradient(model, share):
    batch = batch_of(model)
    terms, expected = model(**batch), gradients(model, batch)
    model.recompute_activations(share)
    model.train()
    for name, term in model(**batch).items():
        torch.testing.assert_close(term, terms[name], rtol=1e-6, atol=0)
    recomputed = gradients(model, batch)
    assert recomputed.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dropping", ["attention", "low-rank updates"])
@pytest.mark.parametrize("backend", [None, pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_recomputed_layers_drop_what_their_forward_pass_dropped(model, dropping, backend):
    batch = batch_of(model)
    if dropping == "attention":
        for layer in model.student.get_decoder().layers:
            layer.self_attn.attention_dropout = 0.5
    else:
        pytest.importorskip("peft")
        add_updates(Lora(rank=4, alpha=8, dropout=0.5), SimpleNamespace(model=model.student))
        updates = [p for name, p in model.named_parameters() if ".lora_B." in name]
        assert updates
        for update in updates:
            torch.nn.init.normal_(update)  # zeros at first, for which dropping changes nothing
    model.train()
    torch.compiler.reset()
    if backend:
        compile_parts(model, backend)
    found = []
    # Each new share is compiled again, which takes long; at 0.5, some layers are recomputed and some are not.
    for share in (0.0, 0.5) if backend else (0.0, 0.5, 1.0):
        if share:
            model.recompute_activations(share)
        torch.manual_seed(3)
        found.append(gradients(model, batch))
    model.eval()
    without = gradients(model, batch)
    assert any((without[name] - gradient).abs().max() > 1e-3 for name, gradient in found[0].items())
    for again in found[1:]:
        for name, gradient in found[0].items():
            torch.testing.assert_close(again[name], gradient, rtol=1e-5, atol=1e-7)


def test_the_share_of_layers_that_are_recomputed_is_spread_evenly(model):
    layers = model.student.model.language_model.layers
    before = len(model.student.model.vision_tower.encoder.layers)
    model.recompute_activations(0.5)
    assert [layer.gradient_checkpointing for layer in layers] == [(at + before) % 2 == 1 for at in range(len(layers))]


@pytest.mark.parametrize("recompute", [False, True])
def test_a_frozen_encoder_keeps_nothing_for_the_backward_pass(model, recompute):
    if recompute:
        model.recompute_activations()
    seen = []
    model.student.model.vision_tower.register_forward_hook(
        lambda _, args, output: seen.append(output.hidden_states[-2])
    )
    model.train()(**batch_of(model))
    assert [states.requires_grad for states in seen] == [False]
    assert seen[0].shape[0] == 2, "all images in one call, none for text rows"


def test_padding_on_the_right_changes_no_term(model):
    batch = batch_of(model)
    terms = model(**batch)
    longer = {
        "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 9), value=7),
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 9)),
        "labels": torch.nn.functional.pad(batch["labels"], (0, 9), value=-100),
    }
    for name, term in model(**{**batch, **longer}).items():
        torch.testing.assert_close(term, terms[name], rtol=1e-5, atol=1e-7)


def test_a_batch_without_labels_is_zero_not_nan(model):
    batch = batch_of(model, images=0, text=2)
    batch |= {"labels": torch.full_like(batch["labels"], -100), "num_tokens": 1}
    outputs = model(**batch)
    assert outputs["loss"] == 0 and outputs["ntp"] == 0


def test_every_learning_parameter_gets_a_gradient_in_every_batch(model):
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    for images in (2, 0):
        missing = learning - gradients(model, batch_of(model, images=images)).keys()
        assert not missing, f"plain DDP would stop at step 2: {missing}"


def test_text_only_batches_move_nothing_in_pt_but_their_own_tokens(model):
    found = gradients(model, batch_of(model, images=0, text=3))
    assert all(not gradient.any() for gradient in found.values())


def test_text_only_rows_do_not_dilute_the_embedding_losses(model):
    alone, together = batch_of(model, images=2, text=0), batch_of(model, images=2, text=3)
    for key in ("input_ids", "attention_mask", "labels"):
        together[key] = torch.cat((alone[key], together[key][2:]))
    together |= {"pixel_values": alone["pixel_values"], "targets": alone["targets"]}
    with torch.no_grad():
        one, other = model(**alone), model(**together)
    for name in ("depth/2/smooth_l1", "depth/2/info_nce"):
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-7)


def test_each_stage_trains_exactly_its_parts(model):
    expected = {
        "pt": {"projector", "task_tokens", "predictors", "logit_scales"},
        "vpt": {"vision", "projector", "llm"},
        "ift": {"projector", "llm"},
    }
    for stage, parts in expected.items():
        counts = apply_stage(model, stage)
        assert {c.part for c in counts if c.trainable} == parts
        assert all(c.trainable in (0, c.total) for c in counts)


def test_only_a_learning_encoder_is_in_training_mode(model):
    vision = model.student.model.vision_tower
    assert not model.train().student.model.vision_tower.training
    vision.requires_grad_(True)
    assert model.train().student.model.vision_tower.training and model.student.model.language_model.training


def test_a_pattern_that_matches_nothing_is_refused(model):
    model.objective = None
    with pytest.raises(ValueError, match=r"trains 'predictors\.\*', but the model has no such parameters"):
        apply_stage(model, "pt")
    apply_stage(model, "pt", lacks=DISTILLATION_PARTS)
    model.task_tokens = None
    apply_stage(model, "pt", lacks=DISTILLATION_PARTS + TASK_TOKEN_PARTS)


def test_a_parameter_of_no_part_is_refused():
    with pytest.raises(ValueError, match="belongs to no part"):
        part_name("teacher.weight")


def test_predictions_have_the_teachers_shape(model):
    batch = batch_of(model)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values")}
    predicted = model.predict(inputs, batch["image_rows"])
    assert {name: tuple(value.shape) for name, value in predicted.items()} == {"depth/2": (2, TOKENS, WIDTH)}
