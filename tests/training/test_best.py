"""The best checkpoint may be much older than the newest one, which alone is verified when a run is resumed."""

import json
import shutil

import pytest

from visper.common.errors import TrainingError
from visper.common.manifest import write_manifest
from visper.training.best import BEST, MEASURED_ON, best_checkpoint


@pytest.mark.parametrize("damage", [lambda folder: (folder / "shard").write_bytes(b"two"), shutil.rmtree])
def test_a_best_checkpoint_that_is_damaged_or_gone_is_never_read(tmp_path, damage):
    folder = tmp_path / "checkpoints" / "checkpoint-2"
    folder.mkdir(parents=True)
    (folder / "shard").write_bytes(b"one")
    write_manifest(folder)
    best = {"measure": "eval/loss", "checkpoint": folder.name, MEASURED_ON: "rows"}
    (tmp_path / BEST).write_text(json.dumps(best))
    assert best_checkpoint(tmp_path, "eval/loss", "rows") == folder
    damage(folder)
    with pytest.raises(TrainingError, match=r"checkpoint-2', is damaged or was removed .*evaluation\.use_best=false"):
        best_checkpoint(tmp_path, "eval/loss", "rows")
