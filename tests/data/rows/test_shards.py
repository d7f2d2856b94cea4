"""A row from a shard is the row it was; each rank reads its own shards; the position is the step."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
import pytest
from accelerate.data_loader import BatchSamplerShard

from tests import tiny
from tests.conftest import outside
from tests.data.test_chat import CHATML, make_processor
from visper.common.errors import DataError
from visper.data.chat import ConversationEncoder
from visper.data.collator import Sample
from visper.data.dataset import ConversationDataset, survey
from visper.data.rows.records import DropList
from visper.data.rows.shards import GROUP_ROWS, write_shards
from visper.data.rows.sources import blocks_of, open_records
from visper.data.rows.table import Records
from visper.data.sampler import RowSampler

SMALL = 5_000  # bytes a shard: a group or two


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return tiny.write_rows(tmp_path / "rows", images=40, text_rows=30)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("visper.data.rows.shards._AT_ONCE", GROUP_ROWS)


def plain(rows: Path) -> Records:
    return open_records([(rows / "rows.json", rows / "images")], DropList())


def sharded(rows: Path, out: Path) -> Records:
    write_shards(plain(rows), out, DropList(), SMALL)
    return open_records([(str(out), None)], DropList())


def own_id(sample_id: str) -> str:
    return sample_id.split("/", 2)[2]


def test_rows_and_pictures_come_back(rows: Path, tmp_path: Path) -> None:
    encoder = ConversationEncoder(make_processor(CHATML), 500)
    files = ConversationDataset(plain(rows), encoder)
    shards = ConversationDataset(sharded(rows, tmp_path / "shards"), encoder)
    assert len(shards) == len(files) == 70
    expected = {own_id(item.id): item for item in (files[i] for i in range(70)) if isinstance(item, Sample)}
    for i in range(70):
        item = shards[i]
        assert isinstance(item, Sample)
        other = expected.pop(own_id(item.id))
        assert (item.input_ids, item.labels) == (other.input_ids, other.labels)
        assert (item.pixel_values is None) == (other.pixel_values is None)
        if item.pixel_values is not None and other.pixel_values is not None:
            assert (item.pixel_values == other.pixel_values).all()
    assert not expected


def test_any_parquet_reader_reads_a_shard(rows: Path, tmp_path: Path) -> None:
    sharded(rows, tmp_path / "shards")
    index = json.loads((tmp_path / "shards" / "index.json").read_text())
    assert len(index["shards"]) > 2 and index["rows"] == 70
    for shard in index["shards"]:
        assert pq.read_table(tmp_path / "shards" / shard["file"]).num_rows == shard["rows"]


def test_the_order_is_shuffled_once_by_the_seed(rows: Path, tmp_path: Path) -> None:
    ids = []
    for seed in (0, 0, 1):
        write_shards(plain(rows), tmp_path / f"{len(ids)}" / "s", DropList(), SMALL, seed)
        ids.append([record.id for record in open_records([(str(tmp_path / f"{len(ids)}" / "s"), None)], DropList())])
    assert ids[0] == ids[1] != ids[2] and sorted(map(own_id, ids[0])) == sorted(map(own_id, ids[2]))


def test_rows_without_a_picture_are_left_out_and_named(rows: Path, tmp_path: Path) -> None:
    (rows / "images" / "3.png").unlink()
    (rows / "images" / "5.png").write_bytes(b"")
    drops = DropList()
    shards = write_shards(plain(rows), tmp_path / "shards", drops, SMALL)
    assert sum(shard.rows for shard in shards) == 68
    assert drops.counts() == {"missing image": 1, "empty image file": 1}


def test_shards_from_afar_are_fetched_and_forgotten(rows: Path, tmp_path: Path) -> None:
    here = sharded(rows, tmp_path / "shards")
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "shards"), "/far/shards", recursive=True)
    far = open_records([("memory://far/shards", None)], DropList())
    far = pickle.loads(pickle.dumps(far))
    assert [far.picture(i) for i in range(len(far))] == [here.picture(i) for i in range(len(here))]
    fetched = far.parts[0].pictures.fetched
    assert 0 < len(list(fetched.iterdir())) <= 3 < len(far.parts[0].pictures.shards)
    memory.rm("/far", recursive=True)


def test_a_shard_that_comes_broken_is_named(rows: Path, tmp_path: Path) -> None:
    sharded(rows, tmp_path / "shards")
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "shards"), "/broken/shards", recursive=True)
    far = open_records([("memory://broken/shards", None)], DropList())
    memory.pipe("/broken/shards/00000.parquet", b"half")
    with pytest.raises(DataError, match=r"broken shard.*00000\.parquet.*sha256"):
        far.picture(0)
    memory.rm("/broken", recursive=True)


@pytest.mark.parametrize("content", [None, "{", "{}", '{"format": "other"}'])
def test_what_is_no_folder_of_shards_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "index.json").write_text(content)
    with pytest.raises(DataError, match="shards"):
        open_records([(str(tmp_path), None)], DropList())


def test_an_interrupted_writing_leaves_nothing(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> str:
        raise OSError("disk full")

    monkeypatch.setattr("visper.data.rows.shards._sha256", stop)
    with pytest.raises(OSError, match="disk full"):
        write_shards(plain(rows), tmp_path / "out" / "shards", DropList(), SMALL)
    assert list((tmp_path / "out").iterdir()) == []


def test_what_a_killed_writing_left_is_removed_by_the_next(rows: Path, tmp_path: Path) -> None:
    finished = subprocess.Popen([sys.executable, "-c", ""])
    finished.wait()
    for process in (finished.pid, os.getppid()):
        (tmp_path / f".shards.partial-{process}").mkdir()
    write_shards(plain(rows), tmp_path / "shards", DropList(), SMALL)
    assert {entry.name for entry in tmp_path.iterdir()} >= {"shards", f".shards.partial-{os.getppid()}"}, (
        "still at work"
    )
    assert not (tmp_path / f".shards.partial-{finished.pid}").exists()


class Batches(list):  # type: ignore[type-arg]
    """Batches as a batch sampler."""

    batch_size = 4
    drop_last = False


def batches(blocks: list[int], processes: int, micro: int, grouped: bool, epoch: int = 0) -> list[list[int]]:
    lengths = [i % 7 for i in range(len(blocks))] if grouped else None
    has_image = [i % 3 > 0 for i in range(len(blocks))] if grouped else None
    sampler = RowSampler(len(blocks), 1, lengths, has_image, micro * processes, blocks, processes)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert sorted(order) == list(range(len(blocks)))
    return [order[i : i + micro] for i in range(0, len(order), micro)]


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_each_rank_reads_its_own_shards(processes: int, grouped: bool) -> None:
    blocks = [i // 24 for i in range(24 * 16)]
    found = batches(blocks, processes, 4, grouped)
    # as the engine deals them
    ranks = [
        [blocks[i] for batch in BatchSamplerShard(Batches(found), processes, rank) for i in batch]
        for rank in range(processes)
    ]
    assert all(not set(a) & set(b) for i, a in enumerate(ranks) for b in ranks[:i])
    if not grouped:  # and one after the other
        assert all(len({*rank[i : i + 24]}) == 1 for rank in ranks for i in range(0, len(rank), 24))
    assert batches(blocks, processes, 4, grouped) == found != batches(blocks, processes, 4, grouped, epoch=1)


def test_uneven_shards_lose_no_row() -> None:
    blocks = [block for block, size in enumerate([5, 40, 17, 3, 28, 11]) for _ in range(size)]
    assert sum(map(len, batches(blocks, 2, 4, False))) == sum(map(len, batches(blocks, 2, 4, True))) == len(blocks)


def test_fewer_shards_than_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="1 shards for 2 processes: write smaller shards"):
        RowSampler(8, group_size=4, blocks=[0] * 8, processes=2)


def test_rows_of_a_file_beside_shards_have_blocks_of_their_own(rows: Path, tmp_path: Path) -> None:
    sharded(rows, tmp_path / "shards")
    both = open_records([(rows / "rows.json", rows / "images"), (str(tmp_path / "shards"), None)], DropList())
    blocks = blocks_of(both)
    assert blocks is not None and len(blocks) == len(both) == 140
    assert not set(blocks[:70]) & set(blocks[70:]) and blocks_of(plain(rows)) is None


def test_real_photographs_survive(tmp_path: Path) -> None:
    folder = outside("photos")
    records = open_records([(folder / "instruct.json", folder)], DropList())
    drops = DropList()
    write_shards(records, tmp_path / "shards", drops, 1 << 19)
    shards = open_records([(str(tmp_path / "shards"), None)], drops)
    assert len(shards) == len(records) and not len(drops)
    encoder = ConversationEncoder(make_processor(CHATML), 4096)
    assert len(survey(shards, encoder, drops, quiet=True).records) == len(records)
    by_id = {own_id(record.id): record for record in records}
    for index in range(0, len(shards), 7):
        file = by_id[own_id(shards[index].id)].image
        assert shards.picture(index) == (Path(file).read_bytes() if file else None)
