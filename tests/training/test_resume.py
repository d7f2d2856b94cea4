"""A checkpoint is continued in the order it was written in, or not at all."""

from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from tests.records import records_of
from visper.common.errors import ConfigError
from visper.data.rows.records import DropList, Record
from visper.data.sampler import Mixture, RowSampler
from visper.training.resume import order_of, require_same_order, write_order
from visper.training.stage_data import StageData

ROWS = 12


def data(ids: int = ROWS, ending: str = "", **sampling: Any) -> StageData:
    with TemporaryDirectory() as folder:
        records = records_of(Path(folder), [Record(f"{i}{ending}", ()) for i in range(ids)])
    dataset = SimpleNamespace(records=records)
    return StageData(cast(Any, dataset), cast(Any, None), RowSampler(ids, **sampling), DropList(), ids)


HALVES = torch.arange(ROWS) // (ROWS // 2)
MIXTURE = {"mixture": Mixture(HALVES, (2.0, 0.5))}
LENGTHS = {"lengths": list(range(ROWS)), "has_image": [True] * ROWS}


@pytest.mark.parametrize("sampling", [{}, LENGTHS, MIXTURE])
def test_the_same_order_goes_on(sampling: dict[str, Any], tmp_path: Path) -> None:
    write_order(tmp_path, data(**sampling))
    require_same_order(tmp_path, data(**sampling))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (data(ROWS - 1), f"{ROWS} rows then, {ROWS - 1} now"),
        (data(seed=1), "other rows"),
        (data(**LENGTHS), "other rows"),
        (data(**MIXTURE), "other rows"),
    ],
    ids=["a row less", "another seed", "grouped", "another mixture"],
)
def test_other_data_are_refused_with_what_to_do(tmp_path: Path, other: StageData, message: str) -> None:
    write_order(tmp_path, data())
    with pytest.raises(ConfigError, match=f"{message}; .*visper data check"):
        require_same_order(tmp_path, other)


def test_other_weights_are_another_order(tmp_path: Path) -> None:
    write_order(tmp_path, data(**MIXTURE))
    with pytest.raises(ConfigError, match="other rows"):
        require_same_order(tmp_path, data(mixture=Mixture(HALVES, (0.5, 2.0))))


def test_as_many_other_rows_are_other_rows(tmp_path: Path) -> None:
    one, other = data(), data(ending="x")
    assert order_of(one)["rows"] == order_of(other)["rows"] and order_of(one) != order_of(other)
