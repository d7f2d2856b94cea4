"""Our Perceiver resampler equals the published one: outputs and every gradient (golden fixture g1)."""

import re

import pytest
import torch

from tests.published.names import from_published, published_name
from visper.distillation.heads import PerceiverResampler, fit_queries

# Measured over outputs and all gradients of all cases, relative to each tensor's largest value: 3.7e-6
# (float32; SDPA and once-projected queries only change the order of sums).
TOLERANCE = 1e-5

CASES = (
    "resampler",
    "task_token_resampler_same",
    "task_token_resampler_tile",
    "task_token_resampler_mean",
    "task_token_resampler_q1",
)


@pytest.mark.parametrize("case", CASES)
def test_resampler_equals_the_published_one(golden, case):
    config, tensors = golden("g1_resampler")
    sizes = config.get(case, config.get("task_token_resampler_*"))
    weights = golden.part(tensors, f"{case}/weight/")
    resampler = PerceiverResampler(
        sizes["embedding_dim"],
        sizes["dim"],
        sizes["output_dim"],
        sizes["depth"],
        sizes["heads"],
        sizes["dim_head"],
        sizes["ff_mult"],
        num_latents=sizes["num_queries"] if "latents" in weights else None,
    )
    resampler.load_state_dict(from_published(weights))
    x = tensors[f"{case}/in/x"].requires_grad_()
    latents = tensors.get(f"{case}/in/latents")
    queries = None if latents is None else fit_queries(latents.requires_grad_(), sizes["num_queries"])
    out = resampler(x, queries)
    assert golden.distance(out, tensors[f"{case}/out/0"]) < TOLERANCE
    out.square().sum().backward()
    assert golden.distance(x.grad, tensors[f"{case}/grad_in/x"]) < TOLERANCE
    if latents is not None:
        assert golden.distance(latents.grad, tensors[f"{case}/grad_in/latents"]) < TOLERANCE
    parameters = dict(resampler.named_parameters())
    for name, gradient in golden.part(tensors, f"{case}/grad/").items():
        assert golden.distance(parameters[published_name(name)].grad, gradient) < TOLERANCE, name


@pytest.fixture
def initial(golden):
    """The published resampler's initial weights, and a maker of ours of the same sizes."""
    config, tensors = golden("g1_resampler")
    weights = from_published(golden.part(tensors, "resampler_default_init/weight/"))
    assert weights, "the fixture has no initial weights"
    sizes = config["resampler"]
    shape = [sizes[n] for n in ("embedding_dim", "dim", "output_dim", "depth", "heads", "dim_head", "ff_mult")]
    return weights, lambda: PerceiverResampler(*shape, num_latents=sizes["num_queries"]).state_dict()


def test_initial_weights_are_the_published_ones(golden, initial):
    """Bit for bit from the seed that the fixture names, which shows that they are drawn in the same order too."""
    weights, make = initial
    seed = re.search(r"manual_seed\((\d+)\)", golden("g1_resampler")[0]["resampler_default_init"])
    if seed is None:
        pytest.skip("the fixture does not name the seed of its initial weights")
    torch.manual_seed(int(seed.group(1)))
    ours = make()
    assert ours.keys() == weights.keys()
    for name, value in weights.items():
        assert torch.equal(ours[name], value), name


def test_initial_weights_are_distributed_as_the_published_ones(initial):
    weights, make = initial
    ours = make()
    assert ours.keys() == weights.keys()
    for name, value in weights.items():
        if value.unique().numel() == 1:
            assert torch.equal(ours[name], value), name
        else:  # the relative error of a standard deviation is at most 1 / sqrt(n): six of them allow for chance
            torch.testing.assert_close(ours[name].std(), value.std(), rtol=6 / value.numel() ** 0.5, atol=0, msg=name)
            assert abs(ours[name].mean()) < 6 * value.std() / value.numel() ** 0.5, name
