"""A user's own heads, losses and teachers that would train the wrong thing, or end in the first step, are refused."""

import pytest
import torch

from visper.config import Head, Position
from visper.distillation import DistilledTask, TargetSpec, TokenHead
from visper.distillation.objective import EmbeddingDistillation
from visper.distillation.teachers import SquashedImage, Teacher, build_teacher

HERE = "tests.distillation.test_own_parts"
TARGET = TargetSpec(4, 3, (2, 2))


class Own(TokenHead):
    """Right, with a buffer and dropout."""

    width = 3

    def __init__(self, llm_width, target):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(llm_width, self.width))
        self.register_buffer("factor", torch.ones(1))

    def forward(self, states):
        return self.layers(states) * self.factor


class OneChannel(Own):
    width = 1


class OneToken(Own):
    def forward(self, states):
        return super().forward(states).mean(1, keepdim=True)


class Pair(Own):
    def forward(self, states):
        return super().forward(states), None


def own_loss(predicted, target, mask=None):
    return (predicted - target).abs().mean((1, 2))


def scalar(predicted, target, mask=None):
    return own_loss(predicted, target).mean()


def per_token(predicted, target, mask=None):
    return (predicted - target).abs().mean(-1)


def without_mask(predicted, target):
    return own_loss(predicted, target)


class LossModule(torch.nn.Module):
    def forward(self, predicted, target, mask):
        return own_loss(predicted, target)


def build(head="Own", loss="own_loss", **more):
    loss = loss if isinstance(loss, dict) else {f"{HERE}:{loss}": 1.0}
    task = DistilledTask(TARGET, (1,), Head(kind=f"{HERE}:{head}"), 0.5, Position.IMAGE_TOKENS, loss)
    return EmbeddingDistillation({"own": task}, 8, 2, **more)


def test_right_parts_are_built_as_without_the_trial():
    torch.manual_seed(0)
    before = Own(8, TARGET).layers[1].weight
    drawn = torch.rand(1)
    torch.manual_seed(0)
    head = build().predictors["own_1"]
    assert torch.equal(head.layers[1].weight, before) and torch.rand(1) == drawn and head.layers.training


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"head": "OneChannel"}, r"makes \(2, 3, 1\) of states \(2, 3, 8\): expected \(2, 3, 3\)"),
        ({"head": "OneToken"}, r"makes \(2, 1, 3\) of states \(2, 3, 8\): expected \(2, 3, 3\)"),
        ({"head": "Pair"}, "head .*Pair' cannot be used .*'tuple' object"),
        ({"loss": "scalar"}, r"loss .*scalar' returns shape \(\) for 2 images: return one number for each image"),
        ({"loss": "per_token"}, r"returns shape \(2, 4\) for 2 images"),
        ({"loss": "without_mask"}, "cannot be used .*takes 2 positional arguments but 3 were given"),
        ({"loss": "LossModule"}, "loss .*LossModule' cannot be used"),
        ({"loss": {f"{HERE}:own_loss": 1.0, "elsewhere:own_loss": 1.0}}, "share a name in the log"),
    ],
)
def test_a_part_that_does_not_fit_is_refused_when_the_objective_is_built(parts, message):
    with pytest.raises(ValueError, match=message):
        build(**parts)


def test_a_position_may_be_a_string_and_a_task_that_trains_nothing_is_refused():
    for at in Position:
        assert DistilledTask(TARGET, (1,), at=str(at.value)).at is at
    for nothing in ({"layers": ()}, {"layers": (1,), "loss": {}}):
        with pytest.raises(ValueError, match=r"task 'own' has no (layers|loss): it would train nothing"):
            EmbeddingDistillation({"own": DistilledTask(TARGET, **nothing)}, 8, 2)


def test_a_head_of_another_width_may_be_compared_by_its_gram_matrix():
    build(head="OneChannel", loss={"gram": 1.0})


class ForEachPlace(Own):
    """Has an embedding for each of a 2 x 2 grid of states."""

    def __init__(self, llm_width, target):
        super().__init__(llm_width, target)
        self.places = torch.nn.Parameter(torch.zeros(target.tokens, self.width))

    def forward(self, states):
        return super().forward(states) + self.places


class Wider(Own):
    width = 5


def relational(predicted, target, mask=None):
    """Compares similarities of tokens, whatever the widths; makes a tensor on the default device."""
    own, other = (values @ values.transpose(1, 2) for values in (predicted, target))
    return (own - other).abs().mean((1, 2)) * torch.ones(len(own)).to(own.device)


def test_a_head_for_a_known_number_of_states_and_one_of_another_width_are_built():
    build(head="ForEachPlace")
    build(head="Wider", loss="relational")
    for loss, message in (("own_loss", "cannot be used"), ({"cosine": 1.0}, "makes .* expected")):
        with pytest.raises(ValueError, match=message):
            build(head="Wider", loss=loss)


def test_parts_are_tried_where_a_model_is_built_without_values():
    with torch.device("meta"):
        build(loss="relational")
        with pytest.raises(ValueError, match="return one number for each image"):
            build(loss="scalar")


class NoSpec(Teacher):
    def __init__(self, model):
        super().__init__()
        self.preprocess = SquashedImage((8, 8))

    def encode(self, pixels):
        return pixels


class NoPreprocess(NoSpec):
    def __init__(self, model):
        super().__init__(model)
        self.spec = TARGET
        del self.preprocess


@pytest.mark.parametrize(("kind", "missing"), [("NoSpec", "spec"), ("NoPreprocess", "preprocess")])
def test_a_teacher_that_sets_too_little_is_refused(kind, missing):
    with pytest.raises(ValueError, match=f"has no '{missing}': set it in __init__"):
        build_teacher(f"{HERE}:{kind}", "none")
