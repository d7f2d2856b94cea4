"""``gradient_checkpointing: auto``: the least recomputation that fits a GPU of a given size."""

from types import SimpleNamespace

import pytest
import torch

from tests import tiny
from tests.planning.test_plan import tiny_run, with_optimization
from visper.common import gpus
from visper.common.errors import ConfigError
from visper.planning import fake_run
from visper.planning.fake_run import fake_batch
from visper.planning.fake_step import step_activations
from visper.planning.memory import SHARES, USABLE, Machine
from visper.planning.plan import Plan
from visper.planning.recomputation import least_recomputation


@pytest.fixture
def run(tmp_path, tiny_llm, tiny_encoder):
    return tiny_run(tmp_path, tiny_llm, tiny_encoder, stage="ift", distillation=None)


def peak(run, share):
    return Plan(with_optimization(run, gradient_checkpointing=share), Machine(1, None)).memory.total


def gpu(monkeypatch, bytes_usable, name="NVIDIA Imaginary 1"):
    """A GPU at hand, of which ``bytes_usable`` may be filled."""
    memory = int(bytes_usable / USABLE) + 1
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=memory))


@pytest.mark.slow
def test_no_more_is_recomputed_than_fits(run, monkeypatch):
    none, every = peak(run, 0.0), peak(run, 1.0)
    assert every < none
    for kept, expected in ((1.0, 0.0), (0.75, 0.3), (0.5, 0.5), (0.001, 1.0)):  # 0.75: 0.25 would fit, 0.2 does not
        gpu(monkeypatch, every + kept * (none - every))
        share, why = least_recomputation(run, 1)
        assert share == expected and why.startswith(f"{share:g} of the layers: estimated peak")


@pytest.mark.slow
def test_where_nothing_fits_everything_is_recomputed_with_a_warning_that_names_a_change(run, monkeypatch, caplog):
    gpu(monkeypatch, peak(run, 1.0) - 1)
    assert least_recomputation(run, 1)[0] == 1.0
    (warning,) = caplog.messages
    assert "may not fit" in warning and "first change that fits: optimization.micro_batch=4" in warning


def test_a_given_share_stays_and_where_it_does_not_fit_a_warning_names_a_change(run, monkeypatch, caplog):
    little = with_optimization(run, gradient_checkpointing=0.0)
    gpu(monkeypatch, peak(run, 0.0) + 1)
    assert least_recomputation(little, 1)[0] == 0.0 and not caplog.messages
    gpu(monkeypatch, peak(run, 0.0) - 1)
    assert least_recomputation(little, 1)[0] == 0.0
    (warning,) = caplog.messages
    assert "with 0 of the layers recomputed: estimated peak" in warning and "first change that fits: " in warning


def test_without_an_estimate_everything_is_recomputed(run, monkeypatch):
    gpu(monkeypatch, 80e9)
    lost = run.model_copy(update={"student": run.student.model_copy(update={"llm": "/nowhere/llm"})})
    share, why = least_recomputation(lost, 1)
    assert share == 1.0 and "memory cannot be estimated" in why and "/nowhere/llm" in why


def test_a_model_that_cannot_be_traced_still_trains(run, monkeypatch):
    """Its own code may fail on fake tensors with any exception; the log names it."""

    def fail(*_):
        raise TypeError("unexpected tensor")

    gpu(monkeypatch, 80e9)
    monkeypatch.setattr(fake_run, "step_activations", fail)
    assert least_recomputation(run, 1) == (1.0, "all layers: memory cannot be estimated (TypeError: unexpected tensor)")


@pytest.mark.slow
def test_a_plan_decides_as_training_does(run):
    none = peak(run, 0.0)
    assert Plan(run, Machine(1, none / USABLE + 1)).settings.checkpointing == 0.0
    assert Plan(run, Machine(1, none / USABLE - 1)).settings.checkpointing == SHARES[1]
    assert Plan(run, Machine(1, None)).settings.checkpointing == 1.0  # memory not known
    assert Plan(run, Machine(0, None)).settings.checkpointing == 0.0  # a CPU


@pytest.mark.parametrize("stage", [pytest.param("pt", marks=pytest.mark.slow), "ift"])
def test_a_share_is_planned_at_least_as_traced(stage, tmp_path, tiny_llm, tiny_encoder):
    distillation = tiny.distillation() if stage == "pt" else None
    run = tiny_run(tmp_path, tiny_llm, tiny_encoder, stage=stage, distillation=distillation)
    fit = Plan(with_optimization(run, gradient_checkpointing=0.5), Machine(1, None))
    found = fit.model.activations(fit.rows, 8, 0.5, accumulates=True)
    model = fit.model.model
    model.recompute_activations(0.5)
    rows = fit.rows.largest_micro_batch(8, packed=False)
    batch, _ = fake_batch(rows, fit.model.student, model, fit.model.run, fit.model.fake)
    traced = step_activations(model, fit.model._optimizer, batch, fit.model.run, fit.model.fake, accumulates=True)
    assert traced <= found < 1.25 * traced  # high where the peak moves from one moment to another


def test_a_gpu_is_found_by_its_name_or_the_drivers_and_one_of_unknown_kind_by_its_memory():
    assert gpus.find_gpu("h100 pcie") == gpus.GPUS["H100 PCIe"]
    assert gpus.find_gpu("NVIDIA H100 80GB HBM3") == gpus.find_gpu("NVIDIA H100") == gpus.GPUS["H100"]
    assert gpus.find_gpu("NVIDIA H100 NVL") == gpus.GPUS["H100 NVL"]
    assert gpus.find_gpu("NVIDIA A100-SXM4-40GB") == gpus.GPUS["A100 40GB"]
    assert gpus.find_gpu("RTX 40900", 12) == gpus.Gpu(None, 12)
    with pytest.raises(ConfigError, match=r"'RTX 40900' is not in the table: use one of B200.*--gpu-memory GB"):
        gpus.find_gpu("RTX 40900")


@pytest.mark.parametrize(
    ("name", "own", "taken"),
    [
        ("NVIDIA H100 80GB HBM3", 85e9, 80e9),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 10e9, 10e9),
        ("NVIDIA A100-SXM4-40GB", 42e9, 40e9),
        ("Imaginary 1", 12e9, 12e9),
    ],
)
def test_memory_is_the_tables_or_less(name, own, taken, monkeypatch):
    gpu(monkeypatch, 0, name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=own))
    assert gpus.memory_of(torch.device("cuda", 0)) == taken
