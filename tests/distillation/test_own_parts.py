"""A user's own heads, losses and teachers that would train the wrong thing, or end in the first step, are refused."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests import tiny
from tests.vlms import save_vlm
from visper.common.errors import ConfigError
from visper.config import Distillation, Head, Position, Stage, VlmStudent
from visper.distillation import DistilledTask, Targets, TargetSpec, TokenHead, own_parts
from visper.distillation.layout import TokenLayout
from visper.distillation.objective import EmbeddingDistillation
from visper.distillation.teachers import SquashedImage, Teacher, build_teacher
from visper.distillation.teachers.tasks import build_teachers
from visper.model.vlm import build_vlm
from visper.training.assemble import build_training_model

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


class AcrossImages(Own):
    """Attention between images, as torch's own unless it is told ``batch_first=True``."""

    def forward(self, states):
        made = super().forward(states).transpose(0, 1)
        return torch.nn.functional.scaled_dot_product_attention(made, made, made).transpose(0, 1)


class Detached(Own):
    @torch.no_grad()
    def forward(self, states):
        return super().forward(states)


class Silent(Own):
    forward = torch.nn.Module.forward


class Broken(Own):
    def forward(self, states):
        return super().forward(states[..., :5])


class NoTarget(TokenHead):
    def __init__(self, llm_width):
        super().__init__()


class NeedsOption(Own):
    def __init__(self, llm_width, target, depth):
        super().__init__(llm_width, target)


def own_loss(predicted, target, mask=None):
    return (predicted - target).abs().mean((1, 2))


def masked_loss(predicted, target, mask=None):
    distance = (predicted - target).abs().mean(-1)
    seen = torch.ones_like(distance) if mask is None else mask.float()
    return (distance * seen).sum(1) / seen.sum(1)


def sampled(predicted, target, mask=None):
    """Compares along a random direction."""
    direction = torch.randn(predicted.shape[-1], 1)
    return masked_loss(predicted @ direction, target @ direction, mask)


def beyond_margin(predicted, target, mask=None):
    return ((predicted - target).abs() - 3).relu().mean((1, 2))


def rounded(predicted, target, mask=None):
    return own_loss(predicted, target).round().long()


def of_target(predicted, target, mask=None):
    return own_loss(target, target.mean(1, keepdim=True))


def in_numpy(predicted, target, mask=None):
    return own_loss(predicted, target).detach().numpy()


def scalar(predicted, target, mask=None):
    return own_loss(predicted, target).mean()


def per_token(predicted, target, mask=None):
    return (predicted - target).abs().mean(-1)


def contrastive(predicted, target, mask=None):
    logits = predicted.flatten(1) @ target.flatten(1).T
    return torch.nn.functional.cross_entropy(logits, torch.arange(len(logits)), reduction="none")


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
        ({"head": "AcrossImages"}, "head .*AcrossImages' reads the states of other images: .*batch_first=True"),
        ({"head": "Detached"}, "head .*Detached' gives a result without gradient"),
        ({"head": "Broken", "counts": (16,)}, "head .*Broken' cannot be used .*shapes cannot be multiplied"),
        ({"head": "Silent", "counts": (16,)}, "head .*Silent' cannot be used .*missing the required .forward"),
        ({"head": "NoTarget"}, "head .*NoTarget' must be built from llm_width, target and .*too many positional"),
        ({"head": "NeedsOption"}, "head .*NeedsOption' must be built from .*missing a required argument: 'depth'"),
        ({"loss": "rounded"}, "loss .*rounded' gives a result without gradient"),
        ({"loss": "of_target"}, "loss .*of_target' gives a result without gradient"),
        ({"loss": "in_numpy"}, "loss .*in_numpy' cannot be used .*'numpy.ndarray' object"),
        ({"loss": "scalar"}, r"loss .*scalar' returns shape \(\) for 2 images: return one number for each image"),
        ({"loss": "per_token"}, r"returns shape \(2, 4\) for 2 images"),
        ({"loss": "contrastive"}, "loss .*contrastive' gives an image another number beside other images"),
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


class ForOneSize(ForEachPlace):
    """Has an embedding for each token of images of one size."""

    def __init__(self, llm_width, target):
        super().__init__(llm_width, TargetSpec(20, target.width))


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


def test_a_head_for_a_number_of_states_that_is_not_known_is_built():
    build(head="Broken")  # not known
    build(head="ForEachPlace", counts=(16,))


def test_a_head_for_the_one_size_of_the_data_is_built_for_a_model_of_any_sizes(tmp_path):
    student = build_vlm(VlmStudent(vlm=str(save_vlm(tmp_path / "vlm", "qwen3_vl"))))
    target = {"kind": f"{HERE}:Right", "model": "none"}
    head = {"kind": f"{HERE}:ForOneSize"}
    task = {"target": target, "at": "image_tokens", "layers": [1], "head": head, "loss": {"mse": 1.0}}
    settings = Distillation.model_validate({"tasks": {"own": task}})
    assert student.num_image_tokens == 12  # of an image of nominal size
    build_training_model(student, Stage.IFT, settings, {"own": TARGET})


class AcrossStates(Own):
    """Attention between an image's states."""

    def forward(self, states):
        made = super().forward(states)
        return torch.nn.functional.scaled_dot_product_attention(made, made, made)


def terms_of(loss, image_tokens, head="Own"):
    """Of two rows with an image each; targets are mapped onto the image tokens."""
    count = max(image_tokens)
    ids = torch.tensor([[9] * tokens + [1] * (count - tokens) for tokens in image_tokens])
    layout = TokenLayout.from_ids(ids, None, 9, {}, places=torch.full((sum(image_tokens), 2), 0.5))
    objective = build(head, loss)
    targets = torch.zeros(2, 4, 3)
    given = {"own": Targets(targets, targets, torch.arange(2))}
    return objective({1: torch.randn(2, count, 8)}, objective.read(layout), {}, given, 2)


def test_a_loss_without_mask_is_refused_where_some_tokens_do_not_count():
    terms_of("own_loss", (4, 4))
    terms_of("masked_loss", (4, 3))
    terms_of("sampled", (4, 3))
    for loss in ("own_loss", "beyond_margin"):
        with pytest.raises(ConfigError, match=f"{loss}' ignores its mask"):
            terms_of(loss, (4, 3))


def test_a_head_that_reads_several_states_is_refused_where_some_of_them_are_padding():
    terms_of("masked_loss", (4, 4), "AcrossStates")
    terms_of("masked_loss", (4, 3), "ForEachPlace")
    with pytest.raises(ConfigError, match="AcrossStates' reads several states of an image"):
        terms_of("masked_loss", (4, 3), "AcrossStates")


def sampled_by_numpy(predicted, target, mask=None):
    """Compares along a random direction, with numbers that torch's seed does not decide."""
    direction = torch.from_numpy(np.random.default_rng().standard_normal((predicted.shape[-1], 1))).float()
    return masked_loss(predicted @ direction, target @ direction, mask)


def test_a_loss_with_random_numbers_of_its_own_is_not_taken_for_one_that_mixes_images():
    build(loss="sampled_by_numpy")


def test_trying_a_part_that_samples_leaves_the_runs_random_numbers():
    torch.manual_seed(3)
    build(loss="masked_loss")
    expected = torch.rand(1)
    torch.manual_seed(3)
    build(loss="sampled")
    assert torch.rand(1) == expected


@pytest.mark.skipif(torch.__version__ < "2.11", reason="as in test_fake_gpu")
def test_a_head_is_tried_on_the_device_where_it_is_built(monkeypatch):
    monkeypatch.setattr(own_parts, "_close", lambda one, other: True)  # fake tensors have no values
    with FakeTensorMode(), torch.device("cuda:0"):
        build(loss={"mse": 1.0}, counts=(16,))


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


class NeedsSize(NoSpec):
    def __init__(self, model, size):
        super().__init__(model)


class NoEncode(Teacher):
    pass


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("NoSpec", "has no 'spec': set it in __init__"),
        ("NoPreprocess", "has no 'preprocess': set it in __init__"),
        ("NeedsSize", "must be built from model and .*missing a required argument: 'size'"),
        ("NoEncode", "has no encode: define it"),
    ],
)
def test_a_teacher_that_sets_too_little_is_refused(kind, message):
    with pytest.raises(ValueError, match=message):
        build_teacher(f"{HERE}:{kind}", "none")


class Right(tiny.PooledColors):
    """Takes options by name, as ``PooledColors`` does."""

    def __init__(self, model, **options):
        super().__init__(model, **options)


class OtherShape(Right):
    def encode(self, pixels):
        return super().encode(pixels).transpose(1, 2)


class OneForAll(Right):
    def encode(self, pixels):
        return super().encode(pixels)[:1]


class Joint(Right):
    """As a network that reads the frames of a clip together."""

    def encode(self, pixels):
        made = super().encode(pixels)
        return made - made.mean(0)


class Noisy(Right):
    """As features of a diffusion model, whose images get noise."""

    def encode(self, pixels):
        return super().encode(pixels + torch.randn_like(pixels))


class Arrays(Right):
    def encode(self, pixels):
        return super().encode(pixels).numpy()


class AnySize(Right):
    def __init__(self, model, **options):
        super().__init__(model, **options)
        self.preprocess = torch.Tensor.float


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("OtherShape", r"gave targets of shape \(2, 8, 4\), but its spec says \(2, 4, 8\)"),
        ("OneForAll", r"gave targets of shape \(1, 4, 8\), but its spec says \(2, 4, 8\)"),
        ("Joint", "an image's target depends on the other images of its batch"),
        ("Arrays", "fails on a test image .*'numpy.ndarray' object"),
        ("AnySize", "fails on a test image .*equal size"),
    ],
)
def test_a_teacher_that_breaks_its_spec_is_refused_before_the_rows_are_read(kind, message):
    def settings(name):
        target = {"kind": f"{HERE}:{name}", "model": "none", "grid": 2}
        return Distillation.model_validate({"tasks": {"own": {"target": target, "layers": [1]}}})

    for right in ("Right", "Noisy"):
        assert build_teachers(settings(right), "float32")["own"].spec == TargetSpec(4, 8, (2, 2))
    with pytest.raises(ConfigError, match=f"task 'own': cannot load .*{message}"):
        build_teachers(settings(kind), "float32")
