"""What a run says of itself, and what it does when it goes wrong."""

import logging

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from visper.common.errors import DataError
from visper.config import Monitor
from visper.data.collator import Sizes
from visper.data.rows.records import Drop
from visper.training.callbacks import log_line
from visper.training.global_batch import count
from visper.training.monitor import DATA, REST, DeadTermError, LossSpikeError, NonFiniteLossError, RunMonitor, StepClock


def monitor(**rules):
    return RunMonitor(Monitor(**rules), Accelerator(cpu=True))


def step(watch, loss, rows=("one", "two"), number=1):
    watch.see({"loss": torch.tensor(loss), "ntp": torch.tensor(loss)}, {"sample_ids": list(rows)})
    return watch.settle(number)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_and_names_the_rows(loss):
    with pytest.raises(NonFiniteLossError, match=r"step 7.*'two'"):
        step(monitor(), loss, number=7)


def test_or_the_step_is_left_out(caplog):
    watch = monitor(non_finite="skip")
    with caplog.at_level(logging.WARNING):
        assert not step(watch, float("nan")) and step(watch, 1.0)
    assert "'one'" in caplog.text


def test_a_spike_warns_or_stops_and_a_falling_noisy_loss_does_not(caplog):
    generator = torch.Generator().manual_seed(0)
    for rule in ("warn", "stop"):
        watch = monitor(spike=rule)
        with caplog.at_level(logging.WARNING):
            for number in range(100):
                step(watch, 3 / (1 + number / 30) + 0.1 * float(torch.randn((), generator=generator)), number=number)
            assert not caplog.text
            if rule == "warn":
                step(watch, 30.0, ["bad row"])
                assert "bad row" in caplog.text
                caplog.clear()
            else:
                with pytest.raises(LossSpikeError, match="bad row"):
                    step(watch, 30.0, ["bad row"])


@pytest.mark.parametrize("value", [0.0, 1.25])
def test_a_term_that_stays_as_it_is_is_called_dead_once(value, caplog):
    watch = monitor(dead_after=3)
    with caplog.at_level(logging.WARNING):
        for number in range(8):
            watch.report({"depth/2/smooth_l1": value, "ntp": 1.0 - 0.01 * number}, 1, number)
    assert caplog.text.count("depth/2/smooth_l1") == 1 and "ntp" not in caplog.text
    strict = monitor(dead_after=2, dead_term="stop")
    strict.report({"a/1/b": value}, 1, 1)
    with pytest.raises(DeadTermError, match="a/1/b"):
        strict.report({"a/1/b": value}, 1, 2)


def test_a_micro_batch_without_labels_is_named_with_what_was_dropped(caplog):
    batch = {
        "labels": torch.full((1, 4), -100),
        "attention_mask": torch.ones(1, 4, dtype=torch.long),
        "sample_ids": ["none"],
        "image_rows": torch.empty(0),
        "dropped": [Drop("row-9", "no image")],
        "sizes": Sizes((4,), 0, 0, 16),
    }
    watch = monitor()
    counts = count([batch], watch.accelerator, False, watch.unlabeled([batch]))
    with caplog.at_level(logging.WARNING):
        watch.counted(counts, 3)
    assert "row-9" in caplog.text and "'none'" not in caplog.text
    strict = monitor(no_labels="stop")
    strict.unlabeled([batch])
    with pytest.raises(DataError, match="row-9"):
        strict.counted(counts, 3)


def test_norms_by_part_make_up_the_whole():
    watch, model = monitor(), nn.Module()
    model.task_tokens = nn.Linear(3, 2)
    model.objective = nn.Module()
    model.objective.predictors = nn.Linear(2, 2)
    model.objective.predictors(model.task_tokens(torch.ones(1, 3))).sum().backward()
    watch.norms(model)
    found = watch.report({}, 0, 1)
    whole = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    squares = found["grad_norm_task_tokens"] ** 2 + found["grad_norm_predictors"] ** 2
    assert squares == pytest.approx(float(whole) ** 2)


def test_the_parts_of_a_step_are_the_time_between_marks(monkeypatch):
    now = iter([0.0, 1.0, 4.0, 9.0, 10.0])
    monkeypatch.setattr("visper.training.monitor.time.perf_counter", lambda: next(now))
    clock = StepClock(torch.device("cpu"))
    for part in (REST, DATA, REST, None, DATA):
        clock.mark(part)
    assert {part: s for part, s in clock.collect().items() if s} == {DATA: 2.0, REST: 3.0}
    assert not any(clock.collect().values())


def test_a_console_line_holds_what_fits_the_most_telling_first():
    logs = {"epoch": 1.0, "a/1/info_nce": 2.0, "time_data": 3.0, "ntp": 1.5, "loss": 2.5}
    assert log_line("step 1/2", logs, 80) == "step 1/2  loss 2.5  ntp 1.5  a/1/info_nce 2"
    assert log_line("step 1/2", logs, 20) == "step 1/2  loss 2.5"


def test_defaults_stop_at_nan_and_warn_otherwise():
    assert (Monitor().non_finite, Monitor().spike, Monitor().dead_term, Monitor().no_labels) == (
        "stop",
        "warn",
        "warn",
        "warn",
    )
