import pytest
from pydantic import ValidationError

from visper.config import Distillation, Task, TaskTokenLayout

TEACHER = {"kind": "dinov2", "model": "facebook/dinov2-base"}


def task(**keys):
    return Task.model_validate({"target": TEACHER, "layers": [16], **keys})


def test_a_task_that_names_nothing_else_is_the_published_one():
    made = task()
    assert (made.at, made.head.kind, made.loss) == ("task_tokens", "resampler", {"smooth_l1": 1.0, "info_nce": 0.3})


def test_an_objective_is_stated_in_one_place():
    made = task(
        at="image_tokens",
        head={"kind": "mlp", "depth": 3, "width": 2048, "shared": True},
        loss={"cosine": 1.0, "gram": 0.1},
        schedule={"end": 0.3},
    )
    assert made.head.options == {"depth": 3, "width": 2048} and made.head.shared and not made.head.frozen
    assert made.schedule is not None and made.schedule.end == 0.3


def test_a_null_takes_a_loss_or_an_option_away():
    assert task(loss={"smooth_l1": None, "mse": 1.0}).loss == {"mse": 1.0}
    assert task(head={"kind": "mlp", "width": None}).head.options == {}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"head": {"kind": "mpl"}}, "unknown head 'mpl': did you mean 'mlp'"),
        ({"head": {"kind": "mlp", "dept": 3}}, "no option 'dept': did you mean 'depth'"),
        ({"head": {"kind": "mlp", "width": "wide"}}, "option 'width'.*found 'wide'"),
        ({"loss": {"cosin": 1.0}}, "unknown loss 'cosin': did you mean 'cosine'"),
        ({"loss": {"cosine": 0.0}}, "greater than 0"),
        ({"loss": {}}, "at least 1 item"),
        ({"loss": {"cosine": 1.0, "mine:cosine": 1.0}}, "share a name in the log"),
        ({"layers": []}, "needs 'layers'"),
        ({"at": "projector"}, "has no layers: remove 'layers'"),
        ({"target": {"kind": "dinov2"}}, "needs 'model'"),
        ({"target": {"kind": "encoder"}}, "set 'at' to image_tokens"),
        ({"target": {"kind": "encoder"}, "at": "image_tokens"}, "head.kind to mlp, linear or none"),
        ({"target": {"kind": "encoder"}, "at": "image_tokens", "head": {"kind": "mlp"}}, "info_nce needs the targets"),
        (
            {"target": {"kind": "projector"}, "at": "projector", "layers": [], "head": {"kind": "mlp"}},
            "predicts itself",
        ),
        ({"target": {"kind": "encoder", "model": "x"}, "at": "image_tokens"}, "remove 'model'"),
    ],
)
def test_what_cannot_be_is_refused_before_torch_is_imported(keys, message):
    with pytest.raises(ValidationError, match=message):
        task(**keys)


@pytest.mark.parametrize("name", ["keys", "items", "update", "a.b", "2d", ""])
def test_names_that_cannot_stand_in_parameters_names_are_refused(name):
    with pytest.raises(ValidationError, match="cannot name a task"):
        Distillation.model_validate({"tasks": {name: {"target": TEACHER, "layers": [1]}}})
    with pytest.raises(ValidationError, match="cannot name a task"):
        TaskTokenLayout(order=(name,))
