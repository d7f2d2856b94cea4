"""Trackers that cannot be used are refused before anything is loaded."""

import sys
from types import SimpleNamespace

import pytest

from visper.common.errors import ConfigError
from visper.training import callbacks
from visper.training.callbacks import require_trackers


@pytest.fixture
def wandb(monkeypatch):
    """An installed W&B whose key is what the test says."""
    fake = SimpleNamespace(api=SimpleNamespace(api_key=None))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(callbacks, "find_spec", lambda name: name)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return fake


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_tracker_names_its_extra(name, monkeypatch):
    monkeypatch.setattr(callbacks, "find_spec", lambda _: None)
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
