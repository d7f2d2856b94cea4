"""Our embedding predictors equal the published task-token heads (golden fixture g2).

The published depth head computes three MLPs of the resampler's output, of which the loss reads the first alone; ours
has that one. The fixture's gradients are of a sum over all outputs, so the gradients compared here are those that come
from the output the loss reads: of the heads that have one output only, and of the depth head's first MLP.
"""

import pytest
import torch

from tests.published.names import from_published, published_name
from tests.tiny import published_predictors
from visper.distillation.heads import build_head
from visper.distillation.teachers import TargetSpec

# Measured over outputs and gradients, relative to each tensor's largest value: 2.5e-6 (float32).
TOLERANCE = 1e-5

HEADS = {
    "tt_depth_inter": published_predictors()["depth"],
    "tt_depth_nointer": published_predictors()["depth"].model_copy(update={"mlp": False}),
    "tt_seg": published_predictors()["seg"],
    "tt_gen": published_predictors()["gen"],
}


def build(golden, config, tensors, head):
    sizes = config["proj_config_gen" if head.endswith("gen") else "proj_config"]
    shape = {"depth": sizes["depth"], "heads": sizes["num_heads"], "head_width": sizes["dim_head"]}
    spec = HEADS[head].model_copy(update={**shape, "ff_mult": sizes["ff_mult"]})
    target = TargetSpec(sizes["num_tokens"], sizes["output_dim"])
    predictor = build_head(spec, config["llm_hidden_size"], target)
    predictor.load_state_dict(from_published(golden.part(tensors, f"{head}/weight/")))
    return predictor


@pytest.mark.parametrize("head", HEADS)
def test_predictor_equals_what_the_loss_reads_of_the_published_head(golden, head):
    config, tensors = golden("g2_heads")
    predictor = build(golden, config, tensors, head)
    x, latents = tensors[f"{head}/in/x"].requires_grad_(), tensors[f"{head}/in/latents"].requires_grad_()
    out = predictor(x, latents)
    published = tensors[f"{head}/out/0"]
    if published.dim() == 4:  # seg: channels first, as a map
        published = published.flatten(2).transpose(1, 2)
    assert golden.distance(out, published) < TOLERANCE

    out.square().sum().backward()
    parameters = dict(predictor.named_parameters())
    several = f"{head}/out/1" in tensors
    for name, gradient in golden.part(tensors, f"{head}/grad/").items():
        ours = published_name(name)
        if ours is not None and (not several or ours.startswith("mlp.")):
            assert golden.distance(parameters[ours].grad, gradient) < TOLERANCE, name
    if not several:
        assert golden.distance(x.grad, tensors[f"{head}/grad_in/x"]) < TOLERANCE
        assert golden.distance(latents.grad, tensors[f"{head}/grad_in/latents"]) < TOLERANCE


def test_depth_head_gradients_with_all_published_outputs(golden):
    """With the two unused MLPs and the raw output added back, the gradients of everything agree."""
    config, tensors = golden("g2_heads")
    head = "tt_depth_inter"
    predictor = build(golden, config, tensors, head)
    x, latents = tensors[f"{head}/in/x"].requires_grad_(), tensors[f"{head}/in/latents"].requires_grad_()
    raw = predictor.resampler(x, latents)
    loss = raw.square().sum()
    for number in (1, 2, 3):
        names = {
            f"mlp.{layer}.{kind}": f"linear_{number}.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")
        }
        predictor.mlp.load_state_dict({k.removeprefix("mlp."): tensors[f"{head}/weight/{v}"] for k, v in names.items()})
        weights = {k: v.detach().clone() for k, v in predictor.mlp.named_parameters()}
        out = torch.func.functional_call(predictor.mlp, weights, (raw,))
        assert golden.distance(out, tensors[f"{head}/out/{number - 1}"]) < TOLERANCE
        loss = loss + out.square().sum()
    loss.backward()
    assert golden.distance(x.grad, tensors[f"{head}/grad_in/x"]) < TOLERANCE
    assert golden.distance(latents.grad, tensors[f"{head}/grad_in/latents"]) < TOLERANCE
    parameters = dict(predictor.named_parameters())
    for name, gradient in golden.part(tensors, f"{head}/grad/projector.").items():
        assert golden.distance(parameters[published_name(f"projector.{name}")].grad, gradient) < TOLERANCE, name


def test_full_size_predictors_have_the_published_parameters(golden):
    """Names (through the table) and shapes of the published Llama-3-8B PT checkpoint's heads."""
    shapes = golden.full_size("pt_llama3")
    llm_width = shapes["model.embed_tokens.weight"][1]
    targets = {"depth": TargetSpec(576, 1024), "seg": TargetSpec(576, 1536), "gen": TargetSpec(1, 1024)}
    for task, target in targets.items():
        prefix = f"image_{task}_heads.0."
        published = {
            published_name(name.removeprefix(prefix)): s for name, s in shapes.items() if name.startswith(prefix)
        }
        published.pop(None, None)
        with torch.device("meta"):
            ours = build_head(published_predictors()[task], llm_width, target).state_dict()
        assert published == {name: list(value.shape) for name, value in ours.items()}
