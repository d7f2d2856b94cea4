"""Trackers that cannot be used are refused before anything is loaded; those that can get images."""

import io
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from visper.common.errors import ConfigError
from visper.training import trackers
from visper.training.trackers import log_images, require_trackers, tensorboard


@pytest.fixture
def wandb(monkeypatch):
    """An installed W&B whose key is what the test says."""
    fake = SimpleNamespace(api=SimpleNamespace(api_key=None))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(trackers, "find_spec", lambda name: name)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return fake


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_tracker_names_its_extra(name, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=rf"names {name}, which is not installed: pip install 'visper-lm\[{name}\]'"):
        require_trackers([name], "project")


def test_wandb_needs_a_login_unless_it_is_offline(wandb, monkeypatch):
    with pytest.raises(ConfigError, match="wandb login"):
        require_trackers(["wandb"], "project")
    monkeypatch.setenv("WANDB_MODE", "offline")
    require_trackers(["wandb"], "project")
    monkeypatch.delenv("WANDB_MODE")
    wandb.api.api_key = "key"
    require_trackers(["wandb"], "project")


def test_no_tracker_needs_nothing():
    require_trackers([], "project")


def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (6, 9, 3), dtype=np.uint8))


def test_tensorboard_gets_the_image_and_its_step(tmp_path):
    board = tensorboard(tmp_path).tb_writer
    log_images(["tensorboard"], {"drawings/1": picture()}, 30, board)
    board.close()
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    (event,) = read.Images("drawings/1")
    assert event.step == 30
    shown = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
    assert np.array_equal(shown, np.asarray(picture()))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_images_as_its_own_kind_under_the_trainers_step(name, monkeypatch):
    logged = []
    fake = SimpleNamespace(Image=lambda value: ("image", np.asarray(value).shape), log=logged.append)
    monkeypatch.setitem(sys.modules, name, fake)
    log_images([name], {"drawings/1": picture()}, 30)
    assert logged == [{"drawings/1": ("image", (6, 9, 3)), "train/global_step": 30}]
