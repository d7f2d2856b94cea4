import pytest
import torch
from torch.testing import assert_close

from tests.tiny import published_predictors
from visper.config import Head, Position
from visper.distillation import DistilledTask, EmbeddingDistillation
from visper.distillation.heads import build_head, check_head_fits, fit_queries, query_rows, query_source
from visper.distillation.resampler import PerceiverResampler
from visper.distillation.teachers import TargetSpec

# Another batch size or key count takes another kernel: 2e-7 measured on values of order one.
TOLERANCE = {"rtol": 0, "atol": 2e-6}


def resampler():
    torch.manual_seed(0)
    return PerceiverResampler(12, 8, 6, heads=2, head_width=4)


def test_masked_keys_change_nothing_and_get_no_gradient():
    """FAULT of the published code: its predictors attend to padding, so a row's loss depends on its neighbors."""
    model, states, queries = resampler(), torch.randn(2, 5, 12, requires_grad=True), torch.randn(1, 3, 12)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    out = model(states, queries, mask)
    assert_close(out[1:], model(states[1:, :2], queries), **TOLERANCE)
    out.sum().backward()
    assert states.grad[1, 2:].abs().max() == 0 < states.grad[1, :2].abs().min()


def test_queries_common_to_all_samples_equal_repeated_ones():
    model, states, queries = resampler(), torch.randn(2, 5, 12), torch.randn(1, 3, 12)
    assert_close(model(states, queries), model(states, queries.expand(2, -1, -1)), **TOLERANCE)


def test_order_of_keys_does_not_matter():
    model, states, queries = resampler(), torch.randn(1, 5, 12), torch.randn(1, 3, 12)
    assert_close(model(states[:, [3, 0, 4, 2, 1]], queries), model(states, queries), **TOLERANCE)


def test_resampler_without_latents_wants_queries():
    with pytest.raises(ValueError, match="owns no latents"):
        resampler()(torch.zeros(1, 5, 12))


@pytest.mark.parametrize(
    ("rows", "tokens", "expected"),
    [(2, 2, [0.0, 1.0]), (2, 4, [0.0, 1.0, 0.0, 1.0]), (3, 4, [1.0, 1.0, 1.0, 1.0]), (3, 1, [1.0])],
)
def test_queries_are_taken_tiled_or_averaged(rows, tokens, expected):
    queries = torch.arange(float(rows))[None, :, None]
    assert fit_queries(queries, tokens).flatten().tolist() == expected


def test_published_predictors_have_their_widths():
    target, one = TargetSpec(4, 6), TargetSpec(1, 6)
    predictors = published_predictors()
    depth, seg = (build_head(predictors[task], 12, target) for task in ("depth", "seg"))
    gen = build_head(predictors["gen"], 12, one)
    assert depth.resampler.project_in.out_features == 12
    assert [type(layer).__name__ for layer in depth.mlp] == ["Linear", "ReLU", "Linear"]
    for plain in (seg, gen):
        assert plain.resampler.project_in.out_features == 6
        assert len(plain.mlp) == 0
    assert seg.resampler.layers[0].attention.to_query.out_features == 4 * 32
    assert query_rows(predictors["gen"], one, 8) == 8
    assert query_rows(predictors["seg"], target, 8) == 4


def test_queries_follow_the_target_unless_the_recipe_says():
    assert query_source(Head(), TargetSpec(1, 6)) == "states"
    assert query_source(Head(), TargetSpec(4, 6)) == "matrix"
    assert query_source(Head(queries="matrix"), TargetSpec(1, 6)) == "matrix"


def test_predictors_do_not_depend_on_the_tasks_name():
    target = TargetSpec(4, 6)
    tasks = {name: DistilledTask(target, (1,)) for name in ("depth", "normals")}
    objective = EmbeddingDistillation(tasks, llm_width=12, llm_layers=2)
    depth, normals = (objective.predictors[f"{name}_1"].state_dict() for name in tasks)
    assert {n: v.shape for n, v in depth.items()} == {n: v.shape for n, v in normals.items()}


def test_a_resampler_of_one_channel_predicts_what_it_reads():
    """Layer normalization over one channel would leave its bias alone."""
    torch.manual_seed(0)
    head = build_head(Head(inner="llm"), 12, TargetSpec(4, 1, (2, 2)))
    predicted = head(torch.randn(3, 5, 12), torch.randn(1, 4, 12))
    assert predicted.shape == (3, 4, 1) and predicted.std() > 0.01
    with pytest.raises(ValueError, match=r"head\.inner' to llm"):
        check_head_fits("edges", Head(), TargetSpec(4, 1, (2, 2)))


def test_a_number_of_queries_that_nothing_would_read_is_refused():
    head, target = Head(num_queries=4), TargetSpec(1, 6)
    with pytest.raises(ValueError, match=r"one mean state: remove 'distillation\.tasks\.gen\.head\.num_queries'"):
        check_head_fits("gen", head, target, Position.IMAGE_TOKENS)
    for tokens, head in ((16, Head(num_queries=4)), (1, Head(queries="matrix", num_queries=4))):
        with pytest.raises(ValueError, match=rf"the target's {tokens} tokens, not 4: remove"):
            check_head_fits("gen", head, TargetSpec(tokens, 6), Position.SEQUENCE)
    check_head_fits("gen", Head(num_queries=8), target, Position.TASK_TOKENS, 8)
    check_head_fits("gen", Head(), target, Position.IMAGE_TOKENS)
