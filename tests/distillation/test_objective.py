import pytest
import torch
from torch.testing import assert_close

from tests.tiny import published_predictors
from visper.config import Distillation, Head, Position
from visper.distillation import (
    DistilledTask,
    EmbeddingDistillation,
    Targets,
    TargetSpec,
    TokenLayout,
    check_head_fits,
    gather_targets,
)
from visper.distillation.heads import TokenHead
from visper.distillation.losses import info_nce, smooth_l1

WIDTH, IMAGE = 12, 9
IDS = {"depth": [20, 21], "seg": [22, 23], "gen": [24, 25]}
SPECS = {"depth": TargetSpec(4, 6, (2, 2)), "seg": TargetSpec(4, 5, (2, 2)), "gen": TargetSpec(1, 7)}
LAYERS = {"depth": (1, 3), "seg": (2,), "gen": (3,)}
ROW = [1, IMAGE, IMAGE, 20, 21, 22, 23, 24, 25, 5]
TEXT = [1, 5, 6, 7, 5, 6, 7, 5, 6, 7]
# Another batch size takes other kernels: 4e-7 measured on losses of order one, 1e-7 on gradients.
TOLERANCE = {"rtol": 1e-5, "atol": 2e-6}


@pytest.fixture
def objective():
    torch.manual_seed(0)
    tasks = {task: DistilledTask(SPECS[task], LAYERS[task], published_predictors()[task]) for task in SPECS}
    return EmbeddingDistillation(tasks, WIDTH, 4)


@pytest.fixture
def queries():
    return {task: torch.randn(2 if task == "gen" else 4, WIDTH, requires_grad=True) for task in SPECS}


def states(rows, length=10):
    generator = torch.Generator().manual_seed(1)
    return {layer: torch.randn(rows, length, WIDTH, generator=generator).requires_grad_() for layer in (1, 2, 3)}


def layout(rows, mask=None, images=None):
    return TokenLayout.from_ids(torch.tensor(rows), mask, IMAGE, IDS, images)


def targets(count):
    generator = torch.Generator().manual_seed(2)
    return {t: gather_targets(torch.randn(count, s.tokens, s.width, generator=generator)) for t, s in SPECS.items()}


def part(targets_of_all, rows):
    """What a micro-batch or a rank gets: its own targets, everybody's pool."""
    rows = torch.tensor(rows, dtype=torch.long)
    return {t: Targets(all_.own[rows], all_.pool, all_.labels[rows]) for t, all_ in targets_of_all.items()}


def gradients(objective, queries):
    tensors = [*objective.parameters(), *queries.values()]
    return [torch.zeros_like(t) if t.grad is None else t.grad.clone() for t in tensors]


def test_terms_are_named_by_task_layer_and_kind(objective, queries):
    terms = objective(states(1), objective.read(layout([ROW])), queries, targets(1), 1)
    places = ["depth/1", "depth/3", "seg/2", "gen/3"]
    assert list(terms) == [f"{place}/{kind}" for place in places for kind in ("smooth_l1", "info_nce")]
    assert objective.layers == (1, 2, 3)


def test_terms_are_the_losses_of_the_predictions(objective, queries):
    hidden, lay, want = states(2), layout([ROW, ROW]), targets(2)
    terms = objective(hidden, objective.read(lay), queries, want, 2)
    predicted = objective.predict("depth", hidden, lay, queries)[3]
    assert predicted.shape == (2, 4, 6)
    assert_close(terms["depth/3/smooth_l1"], smooth_l1(predicted, want["depth"].own).mean())
    scale = objective.logit_scales["depth"]
    contrastive = info_nce(predicted, want["depth"].pool, torch.tensor([0, 1]), scale).mean()
    assert_close(terms["depth/3/info_nce"], contrastive)


def test_total_by_hand(objective):
    terms = {"depth/1/smooth_l1": torch.tensor(2.0), "depth/1/info_nce": torch.tensor(10.0)}
    assert objective.total(terms) == pytest.approx(0.5 * (2.0 + 0.3 * 10.0))


def test_logit_scales_start_at_two(objective):
    assert {name: scale.item() for name, scale in objective.logit_scales.items()} == dict.fromkeys(SPECS, 2.0)


def test_everything_learns_from_an_image(objective, queries):
    """FAULT of the published code: masks set to zero just before the losses, so that nothing is distilled at all."""
    hidden = states(2)
    objective.total(objective(hidden, objective.read(layout([ROW, ROW])), queries, targets(2), 2)).backward()
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert all(queries[task].grad.abs().max() > 0 for task in ("depth", "seg"))
    assert all(hidden[layer].grad.abs().max() > 0 for layer in hidden)


def test_gen_reads_its_own_states_not_the_matrix(objective, queries):
    hidden = states(1)
    terms = objective(hidden, objective.read(layout([ROW])), queries, targets(1), 1)
    terms["gen/3/smooth_l1"].backward()
    assert queries["gen"].grad is None
    assert hidden[3].grad[0, 7:9].abs().min() > 0


def test_text_rows_add_nothing_and_receive_nothing(objective, queries):
    """FAULT of the published code: masked samples dilute the means and still receive contrastive gradient."""
    alone = objective(states(1), objective.read(layout([ROW])), queries, targets(1), 1)
    hidden = states(3)
    with torch.no_grad():
        for layer, state in states(1).items():
            hidden[layer][1] = state[0]
    mixed = objective(hidden, objective.read(layout([TEXT, ROW, TEXT])), queries, targets(1), 1)
    for name, term in alone.items():
        assert_close(mixed[name], term, **TOLERANCE)
    objective.total(mixed).backward()
    for state in hidden.values():
        assert state.grad[0].abs().max() == 0 == state.grad[2].abs().max()
        assert state.grad[1].abs().max() > 0


def test_other_tasks_tokens_receive_no_gradient(objective, queries):
    hidden = states(1)
    objective(hidden, objective.read(layout([ROW])), queries, targets(1), 1)["depth/1/smooth_l1"].backward()
    assert hidden[1].grad[0, 5:9].abs().max() == 0 < hidden[1].grad[0, :5].abs().min()


def test_a_batch_of_text_gives_zero_terms_that_reach_every_parameter(objective, queries):
    terms = objective(states(1), objective.read(layout([TEXT])), queries, {}, 0)
    assert len(terms) == 8 and all(term == 0 for term in terms.values())
    objective.total(terms).backward()
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() == 0, name
    assert all(matrix.grad is not None and matrix.grad.abs().max() == 0 for matrix in queries.values())


def test_a_batch_of_text_reaches_every_parameter_under_any_single_loss():
    for kind in ("smooth_l1", "info_nce", "gram", "cosine", "mse"):
        task = DistilledTask(SPECS["depth"], LAYERS["depth"], Head(), loss={kind: 1.0})
        objective = EmbeddingDistillation({"depth": task}, WIDTH, 4)
        matrix = torch.randn(4, WIDTH, requires_grad=True)
        terms = objective(states(1), objective.read(layout([TEXT])), {"depth": matrix}, {}, 0)
        objective.total(terms).backward()
        parameters = dict(objective.named_parameters()) | {"queries": matrix}
        assert [name for name, p in parameters.items() if p.grad is None and "logit_scales" not in name] == [], kind


@pytest.mark.parametrize(
    ("target", "head", "per_task", "what"),
    [
        (SPECS["gen"], Head(), None, "a target of one token has no pairs"),
        (SPECS["depth"], Head(kind="linear"), 1, "a head at one task token predicts one"),
    ],
)
def test_likeness_among_a_single_token_is_refused(target, head, per_task, what):
    with pytest.raises(ValueError, match=f"task 'depth': loss 'gram' compares tokens.*{what}.*to cosine or smooth_l1"):
        check_head_fits("depth", head, target, per_task=per_task, losses={"gram": 1.0})
    check_head_fits("depth", head, SPECS["depth"], per_task=2, losses={"gram": 1.0})
    check_head_fits("depth", head, target, per_task=per_task, losses={"cosine": 1.0})


def test_an_objective_of_likeness_needs_more_than_one_token():
    task = DistilledTask(SPECS["gen"], LAYERS["gen"], Head(), loss={"gram": 1.0})
    with pytest.raises(ValueError, match="has no pairs"):
        EmbeddingDistillation({"gen": task}, WIDTH, 4)


def test_a_rows_terms_do_not_depend_on_its_neighbors_padding(objective, queries):
    """FAULT of the published code: predictors attend to padding."""
    long = [*ROW, 6, 7, 8]
    hidden = states(2, len(long))
    mask = torch.ones(2, len(long), dtype=torch.long)
    mask[0, len(ROW) :] = 0
    together = objective.predict("depth", hidden, layout([[*ROW, 0, 0, 0], long], mask), queries)
    short = {layer: state[:1, : len(ROW)] for layer, state in hidden.items()}
    alone = objective.predict("depth", short, layout([ROW]), queries)
    for layer in (1, 3):
        assert_close(together[layer][:1], alone[layer], **TOLERANCE)


@pytest.mark.parametrize("shares", [[[0], [1], [2], [3]], [[0, 1, 2], [3]], [[], [0, 1, 2, 3]]])
def test_micro_batches_only_change_sums(objective, queries, shares):
    hidden, want = states(4), targets(4)
    whole = objective(hidden, objective.read(layout([ROW] * 4)), queries, want, 4)
    objective.total(whole).backward()
    expected = gradients(objective, queries)
    objective.zero_grad()
    for matrix in queries.values():
        matrix.grad = None
    sums = dict.fromkeys(whole, 0.0)
    for share in shares:
        # Every micro-batch has a text row at its end.
        some = {layer: torch.cat((state[share], state[:1])).detach() for layer, state in hidden.items()}
        ids = layout([ROW] * len(share) + [TEXT])
        terms = objective(some, objective.read(ids), queries, part(want, share), 4)
        objective.total(terms).backward()
        sums = {name: sums[name] + term.detach() for name, term in terms.items()}
    for name, term in whole.items():
        assert_close(sums[name], term.detach(), **TOLERANCE)
    for ours, theirs in zip(gradients(objective, queries), expected, strict=True):
        assert_close(ours, theirs, **TOLERANCE)


class DroppingHead(TokenHead):
    def __init__(self, llm_width, target):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(llm_width, target.width))

    def forward(self, states):
        return self.layers(states)


def test_a_recomputed_head_drops_the_states_that_its_forward_pass_dropped():
    head = Head.model_validate({"kind": f"{__name__}:DroppingHead"})
    task = DistilledTask(SPECS["depth"], LAYERS["depth"], head, at=Position.IMAGE_TOKENS, loss={"smooth_l1": 1.0})
    objective, found = EmbeddingDistillation({"depth": task}, WIDTH, 4).train(), []
    row = torch.tensor([[1, IMAGE, IMAGE, IMAGE, IMAGE, 5]])
    reading = objective.read(TokenLayout.from_ids(row, None, IMAGE, {}))
    for objective.recompute in (False, True):
        objective.zero_grad()
        hidden = states(1, 6)
        torch.manual_seed(3)
        objective.total(objective(hidden, reading, {}, targets(1), 1)).backward()
        found.append([*gradients(objective, {}), *(hidden[layer].grad for layer in LAYERS["depth"])])
    assert all(gradient.abs().max() > 0 for gradient in found[0])
    for again, kept in zip(*reversed(found), strict=True):
        assert_close(again, kept, rtol=0, atol=0)


def test_hidden_states_of_a_bfloat16_student_are_taken(objective, queries):
    hidden = {layer: state.bfloat16() for layer, state in states(1).items()}
    terms = objective(hidden, objective.read(layout([ROW])), queries, targets(1), 1)
    assert all(term.dtype == torch.float32 and term.isfinite() for term in terms.values())


def test_no_teacher_is_in_the_state_dict(objective):
    """FAULT of the published code: teachers are submodules of the student and stand in its checkpoints."""
    assert {name.split(".")[0] for name in objective.state_dict()} == {"predictors", "logit_scales"}


def test_objective_of_a_run():
    teacher = {"kind": "features", "model": "x"}
    tasks = {
        "depth": {"target": teacher, "layers": [2], "weight": 0.25, "head": {"mlp": False}, "loss": {"info_nce": 0.1}},
        "normals": {"target": teacher, "layers": [1, 2]},
    }
    config = Distillation.model_validate({"tasks": tasks, "init_logit_scale": 1.0})
    specs = {"depth": SPECS["depth"], "normals": SPECS["seg"]}
    objective = EmbeddingDistillation.from_config(config, specs, WIDTH, 4)
    assert sorted(objective.predictors) == ["depth_2", "normals_1", "normals_2"]
    assert objective.tasks["depth"].weight == 0.25 and len(objective.predictors["depth_2"].mlp) == 0
    assert objective.tasks["depth"].loss == {"info_nce": 0.1}
    assert objective.logit_scales["normals"].item() == 1.0


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            DistilledTask(SPECS["depth"], (5,), published_predictors()["depth"]),
            "layers 1 to 4.*distillation.tasks.x.layers",
        ),
        (DistilledTask(SPECS["depth"], (2, 2), published_predictors()["depth"]), "each may be tapped only once"),
        (DistilledTask(SPECS["depth"], (1,), Head(num_queries=3)), "head.num_queries' to 4"),
        (DistilledTask(SPECS["depth"], (1,), Head(queries="states")), "head.queries' to 'matrix'"),
        (
            DistilledTask(TargetSpec(4, 1, (2, 2)), (1,), Head(kind="linear"), loss={"cosine": 1.0}),
            "directions.*to smooth_l1",
        ),
        (DistilledTask(SPECS["depth"], (1,), loss={"math:l1": 1.0}), "loss 'math:l1' cannot be loaded"),
    ],
)
def test_tasks_that_fit_neither_model_nor_teacher_are_refused(task, message):
    with pytest.raises(ValueError, match=message):
        EmbeddingDistillation({"x": task}, WIDTH, 4)


@pytest.mark.parametrize("name", ["keys", "update", "a.b", "half", "2d"])
def test_names_that_torch_cannot_hold_are_refused(name):
    with pytest.raises(ValueError, match=f"'{name}'"):
        EmbeddingDistillation({name: DistilledTask(SPECS["depth"], (1,))}, WIDTH, 4)


def test_missing_targets_are_named(objective, queries):
    want = targets(1)
    del want["seg"]
    with pytest.raises(ValueError, match="none of 'seg'"):
        objective(states(1), objective.read(layout([ROW])), queries, want, 1)
    with pytest.raises(ValueError, match=r"the targets are \(1, .*expected \(2, "):
        objective(states(2), objective.read(layout([ROW, ROW])), queries, targets(1), 2)
