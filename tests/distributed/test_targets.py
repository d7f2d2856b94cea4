"""Targets gathered over processes (gloo, CPU): one rank = two ranks, also with uneven numbers of images."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.forked import run_forked
from tests.tiny import published_predictors
from visper.distillation import (
    DistilledTask,
    EmbeddingDistillation,
    TargetSpec,
    TokenLayout,
    gather_targets,
)
from visper.distillation.losses import info_nce, smooth_l1
from visper.target_store.open import DecodedTargets
from visper.target_store.quantize import TargetCodec
from visper.training.global_batch import teacher_targets

WIDTH, IMAGE = 8, 9
SPECS = {"depth": TargetSpec(4, 6), "gen": TargetSpec(1, 5)}
ROW, TEXT = [1, IMAGE, 20, 21, 22, 23, 5], [1, 5, 6, 5, 6, 5, 6]
IDS = {"depth": [20, 21], "gen": [22, 23]}
# Sums in another order: 1e-7 measured on losses and gradients of order 0.1 to 1.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


COUNTS = [(2, 2), (3, 1), (0, 2), (0, 0)]
HAS_IMAGE = {
    "even": [True, True, True, True],
    "uneven": [True, True, True, False],
    "one rank without images": [False, False, True, True],
}


def _worker(rank, port, folder, jobs):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        torch.save({name: work(rank, *arguments) for name, (work, *arguments) in jobs.items()}, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def on_two_ranks(golden, tmp_path_factory):
    """Name of a job -> what it returned on each of two processes. They start once: that is what takes the time."""
    jobs = {("gather", counts): (gather, counts) for counts in COUNTS}
    jobs |= {("stored", counts, dtype): (stored, counts, dtype) for counts in COUNTS for dtype in ("int8", "float16")}
    jobs |= {("learn", name): (learn, has_image) for name, has_image in HAS_IMAGE.items()}
    config, tensors = golden("g3_emb_loss")
    wanted = {name: value.clone() for name, value in tensors.items() if name.startswith("world2_")}
    jobs["published"] = (published, wanted, config["contrastive_loss_weight"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("ranks")
    run_forked(_worker, (port, str(folder), jobs), 2)
    ranks = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    return {name: [found[name] for found in ranks] for name in jobs}


def gather(rank, counts):
    start = sum(counts[:rank])
    own = torch.arange(start, start + counts[rank]).float()[:, None, None].expand(-1, 2, 3)
    found = gather_targets(own)
    return found.own, found.pool, found.labels


def stored(rank, counts, dtype):
    """Of all ranks' targets: sent as they are stored, and decoded first."""
    codec = TargetCodec(TargetSpec(20, 7), dtype)
    packed = codec.pack(torch.randn(sum(counts), 20, 7, generator=torch.Generator().manual_seed(0)))
    own = packed[sum(counts[:rank]) :][: counts[rank]]
    module = DecodedTargets(codec)
    ids = torch.arange(len(own))
    batch = {"image_rows": ids, "image_ids": ids, "teacher_images": {"depth": own}}
    (found,) = teacher_targets([batch], {"depth": module}, torch.device("cpu"), counts)
    exact = gather_targets(module(own))
    return (*astuple_of(found["depth"]), *astuple_of(exact))


def astuple_of(targets):
    return targets.own, targets.pool, targets.labels


@pytest.mark.parametrize("dtype", ["int8", "float16"])
@pytest.mark.parametrize("counts", COUNTS)
def test_targets_sent_as_they_are_stored_make_the_same_pool(on_two_ranks, counts, dtype):
    for own, pool, labels, *exact in on_two_ranks["stored", counts, dtype]:
        assert all(map(torch.equal, (own, pool, labels), exact))
        assert pool.shape == (sum(counts), 20, 7) and pool.dtype == torch.float32


@pytest.mark.parametrize("counts", COUNTS)
def test_pool_holds_every_ranks_targets_in_order(on_two_ranks, counts):
    for rank, (own, pool, labels) in enumerate(on_two_ranks["gather", counts]):
        assert pool.shape == (sum(counts), 2, 3)
        assert pool[:, 0, 0].tolist() == list(range(sum(counts)))
        assert len(labels) == counts[rank] and torch.equal(pool[labels], own)


def test_one_process_pools_its_own():
    own = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    found = gather_targets(own)
    assert found.labels.tolist() == [0, 1, 2] and torch.equal(found.pool, found.own)
    assert not found.pool.requires_grad and found.pool.dtype == torch.float32


def published(rank, tensors, weight):
    case = {name.split("/")[1]: value for name, value in tensors.items() if name.startswith(f"world2_rank{rank}/")}
    predicted, scale = case["pred"].clone().requires_grad_(), case["logit_scale"].reshape(()).clone().requires_grad_()
    found = gather_targets(case["target"])
    contrastive = info_nce(predicted, found.pool, found.labels, scale)
    total = smooth_l1(predicted, found.own).mean() + weight * contrastive.mean()
    total.backward()
    return {"total": total.detach(), "contrastive_per_sample": contrastive.detach(), "grad_pred": predicted.grad}


def test_two_processes_equal_the_published_ones(golden, on_two_ranks):
    _, tensors = golden("g3_emb_loss")
    for rank, found in enumerate(on_two_ranks["published"]):
        for name, value in found.items():
            expected = tensors[f"world2_rank{rank}/{name}"].reshape(value.shape)
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


class Learner(nn.Module):
    """Queries and objective over fixed hidden states, in one module as the trainer has it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        tasks = {task: DistilledTask(spec, (1,), published_predictors()[task]) for task, spec in SPECS.items()}
        self.objective = EmbeddingDistillation(tasks, WIDTH, 2)
        self.project = nn.Linear(WIDTH, WIDTH)
        self.queries = nn.ParameterDict({"depth": torch.randn(4, WIDTH), "gen": torch.randn(2, WIDTH)})

    def forward(self, states, has_image, targets, num_images):
        ids = torch.tensor([ROW if image else TEXT for image in has_image])
        layout = TokenLayout.from_ids(ids, None, IMAGE, IDS)
        hidden = self.project(states)
        hidden = hidden + sum(matrix.mean(0) for matrix in self.queries.values())
        terms = self.objective({1: hidden}, self.objective.read(layout), dict(self.queries), targets, num_images)
        # As in a real step, the next-token loss reaches what text passes through: a sum over local rows.
        return self.objective.total(terms) + 0.001 * hidden.square().sum(), terms


def learn(rank, has_image, ranks=2, steps=3):
    """Some steps over rows ``has_image``, split evenly over the ranks; returns the terms and the weights."""
    generator = torch.Generator().manual_seed(3)
    learner = Learner()
    model = DistributedDataParallel(learner) if ranks > 1 else learner
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
    share = len(has_image) // ranks
    mine = slice(rank * share, (rank + 1) * share)
    history = []
    for _ in range(steps):
        states = torch.randn(len(has_image), len(ROW), WIDTH, generator=generator)
        everything = {
            task: torch.randn(len(has_image), spec.tokens, spec.width, generator=generator)
            for task, spec in SPECS.items()
        }
        chosen = torch.tensor(has_image)[mine]
        targets = {task: gather_targets(values[mine][chosen]) for task, values in everything.items()}
        loss, terms = model(states[mine], has_image[mine], targets, sum(has_image))
        optimizer.zero_grad()
        (loss * ranks).backward()  # DDP averages over ranks; our terms are to be summed
        optimizer.step()
        values = torch.stack([term.detach() for term in terms.values()])
        if ranks > 1:
            dist.all_reduce(values)
        history.append(values)
    return torch.stack(history), {name: value.detach() for name, value in learner.state_dict().items()}


@pytest.mark.parametrize("name", HAS_IMAGE)
def test_two_ranks_equal_one(on_two_ranks, name):
    terms, weights = learn(0, HAS_IMAGE[name], ranks=1)
    (first, weights_0), (second, weights_1) = on_two_ranks["learn", name]
    torch.testing.assert_close(first, terms, **TOLERANCE)
    assert torch.equal(first, second)
    for parameter, value in weights.items():
        torch.testing.assert_close(weights_0[parameter], value, **TOLERANCE)
        assert torch.equal(weights_0[parameter], weights_1[parameter])
