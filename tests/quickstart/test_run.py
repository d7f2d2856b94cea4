"""Faults of a quickstart are a user's errors: one message, no traceback."""

import json
from types import SimpleNamespace

import pytest

from visper.common.console import Console
from visper.common.errors import ConfigError, TrainingError
from visper.quickstart.run import FAST, check_learning, prepare_world


def test_a_world_of_another_seed_is_refused(tmp_path):
    sizes = {"seed": 0, "scenes": FAST.scenes, "held_out": FAST.held_out, "per_kind": FAST.per_kind}
    (tmp_path / "world.json").write_text(json.dumps(sizes))
    assert prepare_world(tmp_path, 0, FAST, Console(quiet=True)) == tmp_path
    with pytest.raises(ConfigError, match="another seed or size: choose another --out"):
        prepare_world(tmp_path, 1, FAST, Console(quiet=True))


def test_a_loss_that_does_not_fall_is_named(tmp_path):
    (tmp_path / "pt").mkdir()
    rows = [{"loss": 1.0, "ntp": 2.0 - step / 9, "depth/3/smooth_l1": 1.0} for step in range(9)]
    (tmp_path / "pt" / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(TrainingError, match=r"did not fall.*: pt: depth/3/smooth_l1$"):
        check_learning(SimpleNamespace(out=tmp_path, runs={"pt": None}))
